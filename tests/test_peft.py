"LoRA against 🤗 peft: the same initial values give the same logits, gradients and weights."
from copy import deepcopy
import pytest, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
from peft_study.encoders import ROLES, Sites, tiny_config
from peft_study.methods.core import apply_method, random_batch, to_peft, trainable
from peft_study.methods.lora import LoRA

def pair(targets):
    "Our model and peft's, dropout off, with equal values in all that learns."
    torch.manual_seed(0)
    config = tiny_config("bert", hidden_size=32, layers=3)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.
    base = AutoModelForSequenceClassification.from_config(config)
    method = LoRA(rank=4, alpha=8, targets=targets)
    ours = apply_method(deepcopy(base), method)
    theirs = get_peft_model(deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules=method.peft_config(Sites(config))["target_modules"],
                                                      task_type="SEQ_CLS", modules_to_save=["classifier"]))
    named = {n.replace(".default", "").replace(".modules_to_save", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    match = {n: named.pop(to_peft(n)) for n in trainable(ours)}
    assert not named, "peft trains more than we do"
    with torch.no_grad():
        for n, p in trainable(ours).items():
            if "lora_B" in n: p.normal_(std=.1)
            match[n].copy_(p)
    return ours.train(), theirs.train(), method, match

def close(a, b): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize("targets", [("query", "value"), ("ffn_out",), ROLES], ids="-".join)
def test_lora_is_peft_lora(targets):
    ours, theirs, method, match = pair(targets)
    batch = random_batch(ours.config, batch=8)
    close(ours(**batch).logits, theirs(**batch).logits)
    for model in (ours, theirs): model(**batch).loss.backward()
    for n, p in trainable(ours).items():
        assert p.grad.abs().max() > 0, n
        close(p.grad, match[n].grad)

def test_twenty_steps_of_adamw():
    ours, theirs, method, match = pair(("query", "value"))
    start = {n: p.detach().clone() for n, p in trainable(ours).items()}
    for params, model in ((list(trainable(ours).values()), ours), (list(match.values()), theirs)):
        optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=.01)
        for step in range(20):
            optimizer.zero_grad(); model(**random_batch(ours.config, batch=8, seed=step)).loss.backward(); optimizer.step()
    for n, p in trainable(ours).items():
        assert (p - start[n]).abs().max() > 1e-3, f"{n} has not learned"
        close(p, match[n])
