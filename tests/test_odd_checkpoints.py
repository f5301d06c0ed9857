"Folders as people have them: what runs, and what is refused in one line before anything is trained."
import json, os, shutil
import pytest, torch
from safetensors.torch import load_file, save_file
from peft_study.run.config import RunConfig
from peft_study.tasks.data import Example, Tokens, load_tokenizer, tokenise, tokenizer_fingerprint
from peft_study.tasks.glue import BadInput
from peft_study.run.model import build_model
from peft_study.run.predict import load_run
from peft_study.run.runs import run_folder
from peft_study.run.train import train


@pytest.fixture
def odd(tiny, tmp_path):
    "A copy of the tiny encoder, to be made odd; its file `name` gets other `values` or other weights."
    folder = tmp_path/"odd"
    shutil.copytree(tiny, folder)
    return folder


def change(file, **values): file.write_text(json.dumps(json.loads(file.read_text()) | values))


def build(folder, **settings):
    config = RunConfig(**dict(task_name="sst2", data="demo", checkpoint=str(folder), method="head") | settings)
    assert config.run_id
    return build_model(config)


def refused(folder, part, **settings):
    with pytest.raises(BadInput) as e: build(folder, **settings)
    text = str(e.value)
    assert part in text and "\n" not in text and "\x1b" not in text and len(text) < 600, text


def with_weights(folder, weights): save_file(weights, folder/"model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", [1, 2], {"state_dict": {}}])
def test_bin_that_is_no_state(odd, content):
    (odd/"model.safetensors").unlink()
    if isinstance(content, bytes): (odd/"pytorch_model.bin").write_bytes(content)
    else: torch.save(content, odd/"pytorch_model.bin")
    refused(odd, "checkpoint")


def test_bin_and_shards_are_the_same_model(odd, tiny):
    from transformers import BertForMaskedLM
    wanted = build(tiny)
    weights = load_file(odd/"model.safetensors")
    (odd/"model.safetensors").unlink()
    torch.save(weights, odd/"pytorch_model.bin")
    found = [build(odd)]
    (odd/"pytorch_model.bin").unlink()
    BertForMaskedLM.from_pretrained(tiny).save_pretrained(odd, max_shard_size="2MB")
    found.append(build(odd))
    for model in found:
        pairs = zip(model.parameters(), wanted.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)
    next(odd.glob("model-00001*")).unlink()
    refused(odd, "model-00001")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["link to nowhere", "folder"])
def test_files_that_are_none(odd, name, how):
    (odd/name).unlink()
    if how == "folder": (odd/name).mkdir()
    else: os.symlink("/no/such/file", odd/name)
    refused(odd, f"{name} is no file that can be read")


@pytest.mark.parametrize("values, part", [
    (dict(num_attention_heads=3), "multiple of the number of attention heads"),
    (dict(hidden_act="nope"), "nope"),
    (dict(is_decoder=True), "is a decoder, by is_decoder"),
    (dict(quantization_config=dict(quant_method="gptq")), "is quantised"),
    (dict(model_type="xbert", auto_map={"AutoConfig": "x.XConfig"}), "custom code"),
    (dict(id2label=[1]), "config.json cannot be used")])
def test_configurations(odd, values, part, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks whether to run code of the checkpoint"))
    change(odd/"config.json", **values)
    refused(odd, part)


@pytest.mark.parametrize("name, value", [("return_dict", False), ("output_attentions", True),
                                         ("output_hidden_states", True), ("chunk_size_feed_forward", 4),
                                         ("gradient_checkpointing", True),
                                         ("_attn_implementation", "flash_attention_2")])
def test_what_another_use_has_left_in_the_configuration(odd, tiny, name, value):
    tokens = load_tokenizer("minilm")("a film", "a story", return_tensors="pt")
    wanted = build(tiny).eval()(**tokens).logits
    change(odd/"config.json", **{name: value})
    model = build(odd)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert torch.equal(model.eval()(**tokens).logits, wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(odd, value):
    "They are named before training, not blamed on the learning rate; those of a head that is not used do not matter."
    weights = load_file(odd/"model.safetensors")
    with_weights(odd, weights | {"cls.predictions.bias": weights["cls.predictions.bias"].fill_(value)})
    build(odd)
    weights["bert.embeddings.word_embeddings.weight"][1996] = value
    with_weights(odd, weights)
    refused(odd, "not finite (NaN): bert.embeddings.word_embeddings.weight")


def test_adapter_of_peft_beside_the_weights(odd):
    (odd/"adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=2, target_modules=["query"])))
    refused(odd, "is an adapter of 🤗 peft")


@pytest.mark.parametrize("names", [["input_ids"], "input_ids", ["input_ids", "other"]])
def test_padding_is_never_attended_to(odd, names):
    change(odd/"tokenizer_config.json", model_input_names=names)
    tokenizer, rows = load_tokenizer(str(odd)), [Example(0, "a very fine film", None, 0), Example(1, "dull", None, 1)]
    batch = Tokens(tokenise(rows, tokenizer), tokenizer.pad_token_id).batch([0, 1])
    assert batch["attention_mask"].tolist()[1] == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("library", ["transformers", "tokenizers"])
def test_another_version_tokenises_anew(library, monkeypatch):
    tokenizer = load_tokenizer("minilm")
    before = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(load_tokenizer("minilm")) == before
    monkeypatch.setattr(f"{library}.__version__", "99")
    assert tokenizer_fingerprint(tokenizer) != before


def own_tokenizer(folder, words, single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", **settings):
    "A tokeniser of words, as a few lines with 🤗 tokenizers make one."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(w, i) for i, w in enumerate(words) if w in single]
    if special: plain.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    for name in ("tokenizer.json", "tokenizer_config.json"): (folder/name).unlink()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", **settings).save_pretrained(folder)


WORDS = "[PAD] [UNK] [CLS] [SEP] a b the".split()


def test_own_tokenisers(odd):
    own_tokenizer(odd, WORDS)
    build(odd)
    own_tokenizer(odd, WORDS, single="$A", pair="$A $B")
    refused(odd, "no tokens around and between two sentences")
    own_tokenizer(odd, [w for w in WORDS if w != "[UNK]"])
    refused(odd, "fails at an unknown character")
    types = ["input_ids", "token_type_ids", "attention_mask"]
    own_tokenizer(odd, WORDS, pair="[CLS] $A [SEP] $B:1 [SEP]:2", model_input_names=types)
    refused(odd, "its tokeniser tells 3 token types apart, its encoder 2")


def test_exported_tokeniser_fits_its_encoder(tmp_path):
    "A RoBERTa with one token type and a BERT tokeniser, which makes two, in plain transformers."
    import transformers as T
    sizes = dict(vocab_size=30_522, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config = T.RobertaConfig(**sizes, max_position_embeddings=66, pad_token_id=0, num_labels=2, type_vocab_size=1)
    for folder in (tmp_path/"one", tmp_path/"two"):
        T.RobertaForSequenceClassification(config).save_pretrained(folder)
        load_tokenizer("minilm" if folder.name == "one" else str(tmp_path/"one")).save_pretrained(folder)
    model = T.AutoModelForSequenceClassification.from_pretrained(tmp_path/"two")
    tokens = T.AutoTokenizer.from_pretrained(tmp_path/"two")("a", "b", return_tensors="pt")
    assert model(**tokens).logits.shape == (1, 2)


def test_published_debertas_load(tmp_path, capsys):
    "They hold absolute positions, which only their pre-training used, and differences to a generator's embeddings."
    from transformers import DebertaV2Config, DebertaV2ForMaskedLM
    sizes = dict(vocab_size=30_522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config = DebertaV2Config(**sizes, max_position_embeddings=64, relative_attention=True, position_biased_input=False,
                             pos_att_type=["p2c", "c2p"], share_att_key=True, type_vocab_size=0)
    DebertaV2ForMaskedLM(config).save_pretrained(tmp_path)
    load_tokenizer("minilm").save_pretrained(tmp_path)
    weights = load_file(tmp_path/"model.safetensors")
    positions = "deberta.embeddings.position_embeddings.weight"
    words = "deberta.embeddings.word_embeddings.weight"
    with_weights(tmp_path, weights | {positions: torch.ones(64, 32), words.replace(".w", "._w"): torch.zeros(8),
                                      "mask_predictions.dense.weight": torch.ones(32, 32)})
    model = build(tmp_path, max_length=64)
    assert torch.equal(model.get_parameter(words), weights[words])
    change(tmp_path/"config.json", position_biased_input=True)
    build(tmp_path, max_length=64)   # where they have their place
    change(tmp_path/"config.json", position_biased_input=False)
    with_weights(tmp_path, weights | {"deberta.encoder.conv.conv.weight": torch.ones(2, 2)})
    refused(tmp_path, "no place for: deberta.encoder.conv.conv.weight", max_length=64)


def test_a_run_does_not_go_on_another_encoder(odd, tmp_path):
    config = RunConfig(task_name="cola", data="demo", checkpoint=str(odd), method="head", n_epochs=1, max_length=16,
                       max_train_examples=16, max_eval_examples=8)
    train([config], tmp_path/"o")
    folder = run_folder(config, tmp_path/"o")
    load_run(folder)
    adapter = folder/"adapter/adapter_model.safetensors"
    adapter.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n")
    with pytest.raises(BadInput, match="git lfs pull"): load_run(folder)
    with_weights(odd, {n: 2 * w for n, w in load_file(odd/"model.safetensors").items()})
    with pytest.raises(BadInput, match="has changed since cola-head"): load_run(folder)
