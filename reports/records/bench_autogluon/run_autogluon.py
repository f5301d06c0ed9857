"""AutoGluon's MultiModalPredictor on the split that `peft-study compare` wrote: python run_autogluon.py DATA OUT

DATA is the folder `data` of a comparison, with train.csv and dev.csv, whose last column is the label; OUT is made, and
gets the predictor, what it says of dev, and a record. The encoder is a folder (--checkpoint). It needs an environment
of its own with autogluon.multimodal. With torch's CPU build install torchvision and timm with --no-deps: torchvision's
compiled operators do not load beside it, and texts need none of them."""
import os
os.environ |= dict(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
import argparse, json, time
from importlib.metadata import version
from pathlib import Path
import pandas as pd
import torch

COMMON = {"model.names": ["hf_text"], "env.num_gpus": 0, "env.accelerator": "cpu", "env.num_workers": 0,
          "env.num_workers_inference": 0, "env.precision": "32",
          "model.hf_text.text_trivial_aug_maxscale": 0.}   # augmentation asks the network for WordNet
SETTINGS = dict(
    lora={"optim.peft": "lora"},                           # all else as AutoGluon has it
    ia3_bias={"optim.peft": "ia3_bias", "optim.lr": 3e-3, "optim.end_lr": 3e-3, "optim.lr_decay": .9,
              "optim.warmup_steps": 0, "env.batch_size": 32},   # as its tutorial on this has it, without its two epochs
    lora_tuned={"optim.peft": "lora", "optim.lr": 1e-3, "optim.lr_decay": 1., "env.batch_size": 32,
                "optim.lora.filter": ["query", "key", "value", "dense"],
                "model.hf_text.pooling_mode": "mean"})     # as near to compare's LoRA as its settings allow
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("data", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--checkpoint", required=True, help="a folder")
parser.add_argument("--settings", default="lora", choices=SETTINGS)
parser.add_argument("--problem", default="binary", choices=["binary", "multiclass", "regression"])
parser.add_argument("--metric", default="accuracy", help="that chooses AutoGluon's checkpoint")
parser.add_argument("--minutes", type=float, default=5)
args = parser.parse_args()

start = time.monotonic()
operators = torch.library.Library("torchvision", "DEF")   # declared, where its compiled part does not load
for name in ("nms", "qnms"): operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from autogluon.multimodal import MultiModalPredictor

train, dev = (pd.read_csv(args.data/f"{part}.csv", keep_default_na=False) for part in ("train", "dev"))
label, path = train.columns[-1], args.out/"predictor"
args.out.mkdir(parents=True, exist_ok=True)
predictor = MultiModalPredictor(label=label, problem_type=args.problem, eval_metric=args.metric, path=str(path))
given = COMMON | SETTINGS[args.settings] | {"model.hf_text.checkpoint_name": args.checkpoint}
predictor.fit(train, time_limit=60 * args.minutes, hyperparameters=given, seed=0)
said = predictor.predict(dev.drop(columns=label)).to_numpy()
pd.DataFrame(dict(label=dev[label], said=said)).to_csv(args.out/"dev_predictions.csv", index=False)
size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
record = dict(settings=args.settings, minutes=args.minutes, seconds=time.monotonic() - start,
              trained=predictor.trainable_parameters, bytes=size,
              threads=torch.get_num_threads(),
              versions={n: version(n) for n in ("autogluon.multimodal", "torch", "transformers", "lightning")})
(args.out/"autogluon.json").write_text(json.dumps(record, indent=1))
