"Every method on every encoder family: all promises, gradients, padding; or refused with the reason."
from copy import deepcopy
from functools import lru_cache
import pytest, torch
from transformers import AutoModelForSequenceClassification
from peft_study.encoders import FAMILIES, ROLES, get_sizes, tiny_config
from peft_study.tasks.glue import BadInput
from peft_study.methods.core import apply_method, check_method, find_method, method_names, random_batch, trainable
from peft_study.run.model import MeanPooled, mean_pooled_
from peft_study.run.speed import speed_up
from peft_study.run.stack import attend_in_stacks, share_frozen, stack_logits
from peft_study.run.train import example_losses

SETTINGS = dict(
    full=[dict(), dict(top_k=1)],
    adapter=[dict(bottleneck_size=4), dict(bottleneck_size=4, init="framework"),
             dict(bottleneck_size=4, placement="pfeiffer"), dict(bottleneck_size=4, placement="parallel")],
    lora=[dict(rank=2), dict(rank=2, alpha=4, targets=ROLES), dict(rank=2, rslora=True, lora_plus=4),
          dict(rank=2, dora=True), dict(rank=2, lora_dropout=.1)],
    prompt=[dict(prompt_length=3), dict(prompt_length=3, read="first")],
    prefix=[dict(prefix_length=3), dict(prefix_length=3, reparam=4)],
    hf_lora=[dict(rank=2)], hf_prompt=[dict(prompt_length=3)], hf_prefix=[dict(prefix_length=3)])
METHODS = [find_method(name)(**settings) for name in method_names() for settings in SETTINGS.get(name, [{}])]
POOLINGS = ("model", "mean")
CELLS = [(kind, method) for kind in FAMILIES for method in METHODS]
cells = pytest.mark.parametrize("kind, method", CELLS, ids=lambda v: label(v))
poolings = pytest.mark.parametrize("pooling", POOLINGS)


def refused(kind, method):
    "Whether the family lacks what the method needs, by its entry in `FAMILIES`."
    family, sizes = FAMILIES[kind], get_sizes(tiny_config(kind))
    if method.name == "prefix": return "functions" not in family.attention_takes
    if method.name == "hf_prefix": return "cache" not in family.attention_takes
    if method.name == "hf_prompt": return sizes.E != sizes.H
    if method.name == "bitfit": return not sizes.biases
    if method.name in ("hf_lora", "hf_ia3") or getattr(method, "dora", False): return bool(family.fused)
    return False


SIZES = ("rank", "alpha", "bottleneck_size", "prompt_length", "prefix_length")

def label(v):
    if isinstance(v, str): return v
    settings = {k: x for k, x in v.model_dump(exclude_defaults=True).items() if k not in SIZES}
    return v.name + "".join(f"-{k}={'all' if k == 'targets' else x}" for k, x in settings.items())


@lru_cache
def model_of(kind, pooling="model"):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config(kind)).eval()
    return mean_pooled_(model) if pooling == "mean" else model


def applied(kind, method, pooling="model"):
    "The method on a copy of the family's model, away from its start; skipped where it is refused."
    try: model = apply_method(deepcopy(model_of(kind, pooling)), method).eval()
    except BadInput as e: pytest.skip(str(e))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trainable(model).values(): p.add_(torch.randn_like(p), alpha=.1)
    return model


@pytest.fixture(scope="module")
def matrix(): return {}


@poolings
@cells
def test_promises(matrix, kind, method, pooling):
    try: matrix[kind, label(method), pooling] = f"{check_method(method, model_of(kind, pooling))['trainable']:,}"
    except BadInput as e:
        matrix[kind, label(method), pooling] = "refused"
        assert refused(kind, method) and kind in str(e), str(e)
    else: assert not refused(kind, method)


def test_matrix(matrix, capsys):
    "Trainable parameters of the tiny models, cell by cell."
    if len(matrix) < len(CELLS) * len(POOLINGS): pytest.skip("not all cells were run")
    with capsys.disabled():
        for pooling in POOLINGS:
            print(f"\n{'pooling ' + pooling:42}" + "".join(f"{kind:>12}" for kind in FAMILIES))
            for method in METHODS:
                row = [f"{matrix[kind, label(method), pooling]:>12}" for kind in FAMILIES]
                print(f"{label(method)[:42]:42}" + "".join(row))
    expected = len(POOLINGS) * sum(refused(kind, method) for kind, method in CELLS)
    assert sum(v == "refused" for v in matrix.values()) == expected


@cells
def test_mean(kind, method):
    """With pooling mean, the head reads the mean of the last hidden states of the text's own tokens; of the prompt's as
    well where it does as 🤗 peft, whose mask has ones there."""
    model = applied(kind, method, "mean")
    classifier, seen = next(m for m in model.modules() if isinstance(m, MeanPooled)), {}
    classifier.base_model.register_forward_hook(lambda module, inputs, out: seen.update(hidden=out.last_hidden_state))
    classifier.dropout.register_forward_pre_hook(lambda module, inputs: seen.update(read=inputs[0]))
    batch = random_batch(model.config)
    with torch.no_grad(): model(**batch)
    as_peft = method.name == "hf_prompt" or getattr(method, "read", "cls") == "first"
    n = method.prompt_length if as_peft else 0
    assert seen["hidden"].shape[1] == n + batch["input_ids"].shape[1]
    lengths = n + batch["attention_mask"].sum(1)
    means = torch.stack([h[:length].mean(0) for h, length in zip(seen["hidden"], lengths)])
    torch.testing.assert_close(seen["read"], means)


@poolings
@cells
def test_padding(kind, method, pooling):
    model = applied(kind, method, pooling)
    batch = random_batch(model.config)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    n = int(mask[-1].sum())
    with torch.no_grad():
        alone = model(input_ids=ids[-1:, :n], attention_mask=mask[-1:, :n]).logits
        together = model(input_ids=ids, attention_mask=mask).logits[-1:]
        unmasked = model(input_ids=ids, attention_mask=torch.ones_like(mask)).logits[-1:]
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
    assert (unmasked - together).abs().max() > 1e-5, "the mask makes no difference, so this shows nothing"


@poolings
@pytest.mark.parametrize("kind, method", [c for c in CELLS if c[1].stacks is not None], ids=label)
def test_stack(kind, method, pooling):
    "Two runs as they stack on a GPU, each with a batch of its own: the outputs of each alone."
    models = [applied(kind, method, pooling) for _ in range(2)]
    with torch.no_grad():
        for p in trainable(models[1]).values(): p.add_(torch.randn_like(p), alpha=.1)
    batches = [random_batch(m.config, batch=3, length=9) for m in models]
    for batch in batches: del batch["labels"]
    with torch.no_grad(): alone = [m(**batch).logits for m, batch in zip(models, batches)]
    for m in models: attend_in_stacks(m)
    share_frozen(models)
    with torch.no_grad(): together = stack_logits(models, {k: torch.stack([b[k] for b in batches]) for k in batches[0]})
    assert (torch.stack(alone) - together).abs().max() < 1e-4


@poolings
@pytest.mark.parametrize("method", METHODS, ids=label)
def test_gradients(method, pooling):
    "Two numbers of every tensor that learns, in float64: autograd against (L(p + ε) - L(p - ε)) / 2ε."
    model = applied("bert", method, pooling).double()
    batch = random_batch(model.config)
    model(**batch).loss.backward()
    g = torch.Generator().manual_seed(0)
    for name, p in trainable(model).items():
        # DoRA's gradient leaves out the norm's, by definition; test_peft checks it
        if getattr(method, "dora", False) and ("lora_A" in name or "lora_B" in name): continue
        for i in torch.randint(p.numel(), (2,), generator=g).tolist():
            losses = []
            with torch.no_grad():
                for sign in (1, -1):
                    p.view(-1)[i] += sign * 1e-5
                    losses.append(model(**batch).loss.item())
                    p.view(-1)[i] -= sign * 1e-5
            difference = (losses[0] - losses[1]) / 2e-5
            assert p.grad.view(-1)[i].item() == pytest.approx(difference, rel=1e-4, abs=1e-9), f"{name}[{i}]"


def gradient(model, precision="fp32"):
    "Of the mean loss in training mode, after the same seed, as one vector."
    batch = random_batch(model.config)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits = model.train()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    example_losses(logits.float(), batch["labels"]).mean().backward()
    return torch.cat([p.grad.flatten() for p in trainable(model).values() if p.grad is not None])


def with_dropout(model, p):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout): module.p = p
    return model


# LoRA's own dropout is torch's on both sides
OUR_DROPOUT = [(kind, method) for kind, method in CELLS if not getattr(method, "lora_dropout", 0)]

@poolings
@pytest.mark.parametrize("kind, method", OUR_DROPOUT, ids=label)
def test_speed_up(kind, method, pooling):
    """In fp32 our dropout and attention, in use but with next to no probability, give the gradient of the plain model
    without any."""
    plain = with_dropout(applied(kind, method, pooling), 0.)
    ours = speed_up(with_dropout(applied(kind, method, pooling), 1e-9), "fp32", torch.device("cpu"))
    torch.testing.assert_close(gradient(ours), gradient(plain), rtol=1e-4, atol=1e-6)


@poolings
@cells
def test_bf16(kind, method, pooling):
    "With the same dropout masks, the gradient in bf16 points where that in fp32 does."
    cpu = torch.device("cpu")
    fp32, bf16 = [gradient(speed_up(applied(kind, method, pooling), p, cpu), p) for p in ("fp32", "bf16")]
    assert torch.cosine_similarity(fp32, bf16, dim=0) > .99


class SameSeed(find_method("adapter")):
    "Begins a stream of random numbers of its own."
    def inject(self, model, sites):
        torch.manual_seed(0)
        return super().inject(model, sites)

class SameWords(find_method("prompt")):
    "Its first values are the encoder's, but the same words under each seed."
    def inject(self, model, sites):
        model = super().inject(model, sites)
        model.prompt_embeddings.data = model.get_input_embeddings().weight[:self.prompt_length].detach().clone()
        return model

class TimesZero(find_method("lora")):
    def inject(self, model, sites):
        model = super().inject(model, sites)
        for module in model.modules():
            if hasattr(module, "lora_scale"): module.lora_scale = 0.
        return model

class ZeroInEvaluation(find_method("adapter")):
    "What it learns is used in training only."
    def inject(self, model, sites):
        model = super().inject(model, sites)
        def plain_after(module, inputs, h): return h if module.training else inputs[0]
        for path in sites["ffn_end"] + sites["attention_end"]:
            model.get_submodule(path).register_forward_hook(plain_after)
        return model

class DecayOnly(find_method("adapter")):
    "Its tensors are in the optimiser, and no gradient reaches them."
    def inject(self, model, sites):
        model = super().inject(model, sites)
        for module in model.modules():
            if not hasattr(module, "adapter"): continue
            module.adapter.register_parameter("idle", torch.nn.Parameter(torch.randn(3)))
        return model
    def n_parameters(self, s): return super().n_parameters(s) + 2 * s.L * 3


BROKEN = [(SameSeed(bottleneck_size=4), "ignore the seed"), (SameWords(prompt_length=3), "ignore the seed"),
          (TimesZero(rank=2), "has no gradient"), (ZeroInEvaluation(bottleneck_size=4), "makes no difference"),
          (DecayOnly(bottleneck_size=4), "has no gradient")]

@pytest.mark.parametrize("method, why", BROKEN, ids=lambda v: type(v).__name__)
def test_broken_promises(method, why):
    with pytest.raises(AssertionError, match=why): check_method(method, model_of("bert"))


@pytest.mark.parametrize("p, share", [(0., 1.), (.25, .75), (1 - 1e-9, 0.), (1., 0.)])
def test_dropout_at_the_edges(p, share):
    "In the hidden states and in attention, as torch's: all are kept at 0 and none at 1."
    from peft_study.run.speed import attention, cheap_dropout
    module = torch.nn.Sequential(torch.nn.Dropout(p))
    cheap_dropout(module)
    assert (module(torch.ones(100, 100)) != 0).float().mean() == pytest.approx(share, abs=.02)
    assert torch.equal(module.eval()(torch.ones(5)), torch.ones(5))
    q = torch.randn(1, 2, 3, 4)
    assert (attention(torch.nn.Module(), q, q, q, None, dropout=p)[0] != 0).any() == (share > 0)
