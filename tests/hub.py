"A small imitation of the 🤗 Hub on 127.0.0.1: what transformers and datasets ask it for, from a folder."
import hashlib, json, re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

ADDRESS = re.compile(r"/(?P<api>api/)?((?P<kind>models|datasets)/)?(?P<id>[\w.-]+/[\w.-]+)"
                     r"(/(?P<what>revision|tree|paths-info|resolve)/(?P<revision>[^/]+)(/(?P<path>.*))?)?")
COMMIT = "0" * 40


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass

    def answer(self, status=200, content=b"", **headers):
        if isinstance(content, (dict, list)): content = json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": len(content), "X-Repo-Commit": COMMIT} | headers
        for name, value in headers.items(): self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(content)

    def do_GET(self):
        self.server.asked.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        found = ADDRESS.fullmatch(unquote(urlsplit(self.path).path))
        if not found: return self.answer(404, X_Error_Code="RepoNotFound")
        kind, name, path = found["kind"] or "models", found["id"], found["path"] or ""
        if name in self.server.refused:
            status, headers = self.server.refused[name]
            return self.answer(status, **headers)
        folder = self.server.root/kind/name
        if not folder.is_dir(): return self.answer(404, X_Error_Code="RepoNotFound")
        def entry(file):
            path, content = str(file.relative_to(folder)), b"" if file.is_dir() else file.read_bytes()
            kind = "directory" if file.is_dir() else "file"
            return dict(type=kind, path=path, size=len(content), oid=hashlib.sha1(content).hexdigest())
        if found["what"] == "resolve": return self.file(folder/path)
        if found["what"] == "tree":
            there = (folder/path).rglob("*") if "recursive=true" in self.path.lower() else (folder/path).glob("*")
            return self.answer(content=[entry(f) for f in sorted(there)])
        if found["what"] == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
            return self.answer(content=[entry(folder/p) for p in asked if (folder/p).exists()])
        files, flags = (f for f in folder.rglob("*") if f.is_file()), dict(private=False, gated=False, tags=[])
        siblings = [dict(rfilename=entry(f)["path"]) for f in files]
        self.answer(content=dict(id=name, sha=COMMIT, siblings=siblings, disabled=False) | flags)

    do_HEAD = do_POST = do_GET

    def file(self, file):
        if not file.is_file(): return self.answer(404, X_Error_Code="EntryNotFound")
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not part: return self.answer(content=content, **headers)
        start, end = int(part[1]), int(part[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self.answer(206, content[start:end + 1], **headers)


@contextmanager
def hub(root, refused={}): # repository → status, headers of the answer
    "Serve the folders `models/OWNER/NAME` and `datasets/OWNER/NAME`; yields the address, and what has been asked for."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root, server.refused, server.asked = Path(root), refused, []
    Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}", server.asked
    finally:
        server.shutdown()
        server.server_close()
