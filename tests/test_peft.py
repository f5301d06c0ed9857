"Against 🤗 peft: equal values give equal logits, gradients and weights, and each loads what the other saves."
from copy import deepcopy
import pytest, torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
from peft_study.encoders import FAMILIES, ROLES, Sites, tiny_config
from peft_study.methods.core import apply_method, load_adapter, random_batch, save_adapter, trainable
from peft_study.methods.ia3 import IA3
from peft_study.methods.lora import LoRA
from peft_study.methods.prefix import Prefix
from peft_study.methods.prompt import Prompt

PEFT = {LoRA: LoraConfig, IA3: IA3Config, Prompt: PromptTuningConfig, Prefix: PrefixTuningConfig}

def peft_parameter(saved, named):
    "The live parameter that peft saves as `saved`."
    return next(n for n in (saved, saved + ".weight", "prompt_encoder.embedding.weight") if n in named)


def pair(method, peft_config):
    "Our model and peft's, dropout off, with equal values in all that learns."
    torch.manual_seed(0)
    config = tiny_config("bert", hidden_size=32, layers=3)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.
    base = AutoModelForSequenceClassification.from_config(config)
    ours = apply_method(deepcopy(base), method)
    theirs = get_peft_model(deepcopy(base), peft_config)
    named = {n.replace(".default", "").replace(".modules_to_save", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    match = {n: named.pop(peft_parameter(method.peft_name(n), named)) for n in trainable(ours)}
    assert not named, "peft trains more than we do"
    with torch.no_grad():
        for n, p in trainable(ours).items():
            if "classifier" not in n: p.add_(torch.randn_like(p), alpha=.1)
            match[n].copy_(p)
    return ours.train(), theirs.train(), match


def lora_pair(**settings):
    method = LoRA(rank=4, alpha=8, **settings)
    as_peft = LoraConfig(r=4, lora_alpha=8, target_modules=Sites(tiny_config("bert", layers=3)).pattern(method.targets), task_type="SEQ_CLS",
                         use_rslora=method.rslora, use_dora=method.dora)
    return pair(method, as_peft)


def ia3_pair():
    sites = Sites(tiny_config("bert", layers=3))
    return pair(IA3(), IA3Config(task_type="SEQ_CLS", target_modules=sites.pattern(("key", "value", "ffn_out")), feedforward_modules=sites.pattern(("ffn_out",))))


def prompt_pair():
    return pair(Prompt(prompt_length=4, read="first"), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))


def prefix_pair():
    return pair(Prefix(prefix_length=4), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

def same(ours, theirs, match):
    batch = random_batch(ours.config, batch=8)
    close(ours(**batch).logits, theirs(**batch).logits)
    for model in (ours, theirs): model(**batch).loss.backward()
    for n, p in trainable(ours).items():
        assert p.grad.abs().max() > 0, n
        close(p.grad, match[n].grad)


@pytest.mark.parametrize("settings", [dict(), dict(targets=("ffn_out",)), dict(targets=ROLES), dict(rslora=True), dict(dora=True), dict(dora=True, targets=ROLES)],
                         ids=["query-value", "ffn_out", "all", "rslora", "dora", "dora-all"])
def test_lora(settings): same(*lora_pair(**settings))


@pytest.mark.parametrize("make", [ia3_pair, prompt_pair, prefix_pair])
def test_other_methods(make): same(*make())


@pytest.mark.parametrize("make", [lora_pair, ia3_pair, prompt_pair, prefix_pair])
def test_twenty_steps_of_adamw(make):
    ours, theirs, match = make()
    start = {n: p.detach().clone() for n, p in trainable(ours).items()}
    for params, model in ((list(trainable(ours).values()), ours), (list(match.values()), theirs)):
        optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=.01)
        for step in range(20):
            optimizer.zero_grad(); model(**random_batch(ours.config, batch=8, seed=step)).loss.backward(); optimizer.step()
    for n, p in trainable(ours).items():
        assert (p - start[n]).abs().max() > 1e-3, f"{n} has not learned"
        close(p, match[n])


@pytest.mark.parametrize("method", [LoRA(rank=2, alpha=6, targets=ROLES), LoRA(rank=2, rslora=True), LoRA(rank=2, dora=True), IA3(), Prompt(prompt_length=3, read="first"),
                                    Prefix(prefix_length=3), Prefix(prefix_length=3, reparam=8)], ids=["lora", "rslora", "dora", "ia3", "prompt", "prefix", "prefix-reparam"])
def test_peft_loads_what_we_save(method, tmp_path):
    base = AutoModelForSequenceClassification.from_config(tiny_config("bert"))
    ours = apply_method(deepcopy(base), method)
    with torch.no_grad():
        for p in trainable(ours).values(): p.add_(torch.randn_like(p), alpha=.3)
    save_adapter(ours, method, tmp_path)
    theirs, batch = PeftModel.from_pretrained(deepcopy(base), tmp_path).eval(), random_batch(base.config)
    close(ours.eval()(**batch).logits, theirs(**batch).logits)
    assert (ours(**batch).logits - base.eval()(**batch).logits).abs().max() > .01


@pytest.mark.parametrize("method", [LoRA(rank=2, alpha=6, targets=ROLES), LoRA(rank=2, dora=True), IA3(), Prompt(prompt_length=3, read="first"), Prefix(prefix_length=3)],
                         ids=["lora", "dora", "ia3", "prompt", "prefix"])
def test_we_load_what_peft_saves(method, tmp_path):
    base = AutoModelForSequenceClassification.from_config(tiny_config("bert"))
    known = {k: v for k, v in method.peft_config(Sites(base.config)).items() if k != "peft_type"}
    theirs = get_peft_model(deepcopy(base), PEFT[type(method)](task_type="SEQ_CLS", **known))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad: p.add_(torch.randn_like(p), alpha=.3)
    theirs.save_pretrained(tmp_path)
    ours, batch = apply_method(deepcopy(base), method), random_batch(base.config)
    load_adapter(ours, method, tmp_path)
    close(ours.eval()(**batch).logits, theirs.eval()(**batch).logits)


@pytest.mark.parametrize("kind", [k for k in FAMILIES if k != "modernbert"])   # its query and value are blocks of one matrix, which peft cannot adapt apart
def test_peft_loads_every_family(kind, tmp_path):
    base, method = AutoModelForSequenceClassification.from_config(tiny_config(kind)), LoRA(rank=2)
    ours = apply_method(deepcopy(base), method, train_pooler=True)
    with torch.no_grad():
        for p in trainable(ours).values(): p.add_(torch.randn_like(p), alpha=.3)
    save_adapter(ours, method, tmp_path)
    theirs, batch = PeftModel.from_pretrained(deepcopy(base), tmp_path).eval(), random_batch(base.config)
    close(ours.eval()(**batch).logits, theirs(**batch).logits)
