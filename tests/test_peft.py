"Against 🤗 peft: equal values give equal logits, gradients and weights, and each loads what the other saves."
import json
from copy import deepcopy
import pytest, torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
from peft_study.share import exchange
from peft_study.encoders import FAMILIES, ROLES, Sites, tiny_config
from peft_study.share.exchange import load_peft, peft_method, merged_model
from peft_study.tasks.glue import BadInput
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
    learns = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    named = {n.replace(".default", "").replace(".modules_to_save", ""): p for n, p in learns.items()}
    match = {n: named.pop(peft_parameter(method.peft_name(n), named)) for n in trainable(ours)}
    assert not named, "peft trains more than we do"
    with torch.no_grad():
        for n, p in trainable(ours).items():
            if "classifier" not in n: p.add_(torch.randn_like(p), alpha=.1)
            match[n].copy_(p)
    return ours.train(), theirs.train(), match


def lora_pair(**settings):
    method = LoRA(rank=4, alpha=8, **settings)
    targets = Sites(tiny_config("bert", layers=3)).pattern(method.targets)
    as_peft = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="SEQ_CLS",
                         use_rslora=method.rslora, use_dora=method.dora)
    return pair(method, as_peft)


def ia3_pair():
    sites = Sites(tiny_config("bert", layers=3))
    as_peft = IA3Config(task_type="SEQ_CLS", target_modules=sites.pattern(("key", "value", "ffn_out")),
                        feedforward_modules=sites.pattern(("ffn_out",)))
    return pair(IA3(), as_peft)


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


VARIANTS = {"query-value": dict(), "ffn_out": dict(targets=("ffn_out",)), "all": dict(targets=ROLES),
            "rslora": dict(rslora=True), "dora": dict(dora=True), "dora-all": dict(dora=True, targets=ROLES)}

@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
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
            optimizer.zero_grad()
            model(**random_batch(ours.config, batch=8, seed=step)).loss.backward()
            optimizer.step()
    for n, p in trainable(ours).items():
        assert (p - start[n]).abs().max() > 1e-3, f"{n} has not learned"
        close(p, match[n])


LEAVES = {"lora": LoRA(rank=2, alpha=6, targets=ROLES), "rslora": LoRA(rank=2, rslora=True),
          "dora": LoRA(rank=2, dora=True), "ia3": IA3(), "prompt": Prompt(prompt_length=3, read="first"),
          "prefix": Prefix(prefix_length=3), "prefix-reparam": Prefix(prefix_length=3, reparam=8)}

@pytest.mark.parametrize("method", LEAVES.values(), ids=LEAVES)
def test_peft_loads_what_we_save(method, tmp_path):
    base = AutoModelForSequenceClassification.from_config(tiny_config("bert"))
    ours = apply_method(deepcopy(base), method)
    with torch.no_grad():
        for p in trainable(ours).values(): p.add_(torch.randn_like(p), alpha=.3)
    save_adapter(ours, method, tmp_path)
    theirs, batch = PeftModel.from_pretrained(deepcopy(base), tmp_path).eval(), random_batch(base.config)
    close(ours.eval()(**batch).logits, theirs(**batch).logits)
    assert (ours(**batch).logits - base.eval()(**batch).logits).abs().max() > .01


COMES = {name: LEAVES[name] for name in ("lora", "dora", "ia3", "prompt", "prefix")}

@pytest.mark.parametrize("method", COMES.values(), ids=COMES)
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


# Where query and value are blocks of one matrix, peft cannot adapt them apart.
@pytest.mark.parametrize("kind", [kind for kind, family in FAMILIES.items() if not family.fused])
def test_peft_loads_every_family(kind, tmp_path):
    base, method = AutoModelForSequenceClassification.from_config(tiny_config(kind)), LoRA(rank=2)
    ours = apply_method(deepcopy(base), method, train_pooler=True)
    with torch.no_grad():
        for p in trainable(ours).values(): p.add_(torch.randn_like(p), alpha=.3)
    save_adapter(ours, method, tmp_path)
    theirs, batch = PeftModel.from_pretrained(deepcopy(base), tmp_path).eval(), random_batch(base.config)
    close(ours.eval()(**batch).logits, theirs(**batch).logits)


# What others trained with 🤗 peft

def base_model(kind="bert"):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(tiny_config(kind)).eval()


def trained(config, folder, kind="bert"):
    "A model of peft with other values than at its start, saved to `folder`."
    theirs = get_peft_model(base_model(kind), config)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad: p.add_(torch.randn_like(p), alpha=.1)
    theirs.save_pretrained(folder)
    return theirs.eval()


def edited(folder, **settings):
    "The folder's adapter_config.json with other settings."
    file = folder/"adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def lora(**settings):
    return LoraConfig(**dict(task_type="SEQ_CLS", r=3, lora_alpha=6, target_modules=["query", "value"]) | settings)


LOADS = dict(
    rank_pattern=lora(rank_pattern={"layer.0.*query": 2, "value": 1}),
    alpha_pattern=lora(alpha_pattern={r"layer\.1\..*": 9}),
    patterns_rslora=lora(rank_pattern={"query": 4}, alpha_pattern={"query": 5}, use_rslora=True),
    dora_one_layer=lora(use_dora=True, layers_to_transform=0),
    layers=lora(layers_to_transform=[1], layers_pattern="layer"),
    one_layer_pattern=lora(target_modules=r".*layer\.1\..*(query|ffn|intermediate\.dense)"),
    excluded=lora(exclude_modules=r".*layer\.0.*"),
    excluded_ends=lora(exclude_modules=["0.attention.self.query"]),
    bias=lora(bias="lora_only"),
    bias_one_layer=lora(bias="lora_only", layers_to_transform=[0]),
    whole_paths=lora(target_modules=["bert.encoder.layer.0.output.dense", "key"]),
    orthogonal=lora(init_lora_weights="orthogonal", r=4),
    no_start=lora(init_lora_weights=False),
    fan=lora(fan_in_fan_out=True),
    pooler=lora(modules_to_save=["pooler"]),
    ia3_default=IA3Config(task_type="SEQ_CLS"),
    ia3_odd=IA3Config(task_type="SEQ_CLS", target_modules=["query", "attention.output.dense"],
                      feedforward_modules=["query"]),
    projected=PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3, prefix_projection=True,
                                 encoder_hidden_size=8),
    sampled=PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB"))


@pytest.mark.parametrize("config", LOADS.values(), ids=LOADS)
def test_loads(config, tmp_path):
    "The logits of peft; and, saved by us again, in peft."
    theirs, batch = trained(config, tmp_path/"theirs"), random_batch(tiny_config("bert"))
    ours = load_peft(base_model(), tmp_path/"theirs")
    close(ours(**batch).logits, theirs(**batch).logits)
    method = peft_method(tmp_path/"theirs", Sites(ours.config))
    save_adapter(ours, method, tmp_path/"ours")
    close(PeftModel.from_pretrained(base_model(), tmp_path/"ours").eval()(**batch).logits, theirs(**batch).logits)
    if method.mergeable: close(merged_model(ours, method)(**batch).logits, theirs(**batch).logits)


def test_loads_modernbert(tmp_path):
    "peft updates its query, key and value as one matrix."
    theirs = trained(lora(target_modules=["Wqkv"], modules_to_save=["classifier"]), tmp_path, "modernbert")
    batch = random_batch(theirs.config)
    close(load_peft(base_model("modernbert"), tmp_path)(**batch).logits, theirs(**batch).logits)


A = dict(a=1)
ON = dict(
    init_lora_weights="pissa_niter_4", bias="all", megatron_config=A, trainable_token_indices=[1], loftq_config=A,
    corda_config=A, lora_ga_config=A, velora_config=A, alora_invocation_tokens=[1], use_qalora=True,
    monteclora_config=A, lora_bias=True, layer_replication=[[0, 2]], target_parameters=["a"], use_bdlora=A,
    arrow_config=A, kasa_config=A, ensure_weight_tying=True, task_type="CAUSAL_LM")


@pytest.mark.parametrize("setting", ON)
def test_refused_by_name(setting, tmp_path):
    trained(lora(), tmp_path)
    edited(tmp_path, **{setting: ON[setting]})
    with pytest.raises(BadInput, match=setting): load_peft(base_model(), tmp_path)


DEFAULTS = [lora(), IA3Config(task_type="SEQ_CLS"), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
            PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)]

@pytest.mark.parametrize("config", DEFAULTS, ids=lambda config: config.peft_type.value)
def test_every_setting_of_peft_has_an_answer(config, tmp_path):
    "All defaults of the installed peft load; each setting that is not known here is refused when it is on."
    trained(config, tmp_path)
    sites, saved = Sites(tiny_config("bert")), json.loads((tmp_path/"adapter_config.json").read_text())
    peft_method(tmp_path, sites)
    known = set(exchange._kinds[saved["peft_type"]].model_fields) | set(exchange._silent)
    for name in saved.keys() - known:
        edited(tmp_path, **saved | {name: "on"})
        with pytest.raises(BadInput, match=f"{name} = \"on\" is not supported"): peft_method(tmp_path, sites)


def test_a_setting_of_a_later_peft(tmp_path):
    "peft warns and passes over it, and so do we."
    theirs, batch = trained(lora(), tmp_path), random_batch(tiny_config("bert"))
    edited(tmp_path, from_the_future=None, another=dict(a=1))
    with pytest.warns(UserWarning, match="another"): ours = load_peft(base_model(), tmp_path)
    close(ours(**batch).logits, theirs(**batch).logits)


BROKEN = dict(
    target_modules=[None, 3, [1], [], "(", ["nowhere"]], exclude_modules=["[", 1],
    modules_to_save=["classifier", [1], ["("]],
    r=[None, "8", 0, 1.5, [8]], lora_alpha=[None, "a", [1], 0], lora_dropout=["a", 2], use_dora=["yes"],
    rank_pattern=[{"(": 2}, {"query": "2"}, [1]], alpha_pattern=[{"query": None}], layers_to_transform=["a", [9]],
    peft_type=[None, [1], "BOFT"])


@pytest.mark.parametrize("setting, value", [(k, v) for k, values in BROKEN.items() for v in values], ids=str)
def test_broken_settings(setting, value, tmp_path):
    trained(lora(), tmp_path)
    edited(tmp_path, **{setting: value})
    with pytest.raises(BadInput) as error: load_peft(base_model(), tmp_path)
    assert "\n" not in str(error.value)


CUT = ["", "[]", "{", '{"peft_type": "LORA"}', '{"peft_type": "LORA", "r": 8, "lora_alpha": 8}',
       '{"peft_type": "IA3", "target_modules": ["key"]}', '{"peft_type": "PROMPT_TUNING", "task_type": "SEQ_CLS"}',
       '{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}']

@pytest.mark.parametrize("text", CUT)
def test_broken_files(text, tmp_path):
    (tmp_path/"adapter_config.json").write_text(text)
    with pytest.raises(BadInput): load_peft(base_model(), tmp_path)


def test_prefix_of_another_encoder(tmp_path):
    "The same numbers of values, divided among other heads."
    trained(PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3), tmp_path)
    edited(tmp_path, num_attention_heads=4)
    with pytest.raises(BadInput, match="num_attention_heads is 4 in the folder, 2 in the encoder"):
        load_peft(base_model(), tmp_path)


@pytest.mark.parametrize("place", ["here", "/no/such/place"])
def test_place_of_the_encoder(place, tmp_path, monkeypatch):
    "A relative folder becomes absolute, and an id of the Hub stays as it is."
    monkeypatch.chdir(tmp_path)
    (tmp_path/"here").mkdir()
    base = base_model()
    base.config._name_or_path = place
    save_adapter(apply_method(base, LoRA(rank=2)), LoRA(rank=2), tmp_path/"adapter", dict(checkpoint="minilm"))
    saved = json.loads((tmp_path/"adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert saved == (str(tmp_path/"here") if place == "here" else place)
