"A reproducible study of parameter-efficient fine-tuning for BERT on GLUE"
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec

__version__ = "0.2.0"

# Where modules were until 0.1. The code of one's own tasks and methods is part of what names their runs: with other
# imports, a finished run would be another one. So the former names of modules go on, without a file for each.
_ROOMS = dict(tasks="glue demo data", run="config model speed runs resume predict train stack kernels",
              results="statistics plots", share="exchange cards submission", study="records sweep cluster")
_MOVED = {f"peft_study.{module}": f"peft_study.{room}.{module}"
          for room, modules in _ROOMS.items() for module in modules.split()}

class _Moved:
    "Finds modules under their former names (`sys.meta_path`), and loads what is at the new one."
    @staticmethod
    def find_spec(name, path=None, target=None): return ModuleSpec(name, _Moved) if name in _MOVED else None
    @staticmethod
    def create_module(spec): return None
    @staticmethod
    def exec_module(module): sys.modules[module.__name__] = import_module(_MOVED[module.__name__])

sys.meta_path.append(_Moved)

def __getattr__(name): # so that `import peft_study` stays light
    if name in ("compare", "classify"): return getattr(import_module("peft_study.answer.compare"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
