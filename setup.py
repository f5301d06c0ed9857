"Puts into the installed package what it uses of the repository: notebooks, studies, bibliography, published figures."
from pathlib import Path
from shutil import copy
from setuptools import setup
from setuptools.command.build_py import build_py

PROJECT = ["settings.ini", "_quarto.yml", "nbs/experiments/*.ipynb",
           "reports/report.ipynb", "reports/references.bib", "reports/published/**/*"]


class WithProject(build_py):
    def run(self):
        super().run()
        if self.editable_mode: return   # the repository itself is at hand
        for file in (file for pattern in PROJECT for file in Path().glob(pattern) if file.is_file()):
            to = Path(self.build_lib)/"peft_study"/"project"/file
            to.parent.mkdir(parents=True, exist_ok=True)
            copy(file, to)


setup(cmdclass=dict(build_py=WithProject))
