"""A Hugging Face Hub on this machine: what `huggingface_hub` asks of the real one, with repositories in memory."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_rightTokenOfTheOwner"


def blob(content):
    """The name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """Repositories by OWNER/NAME, and faults that a test may switch on.

    `gated`: files are for those who asked. `forbidden`: the token may only read. `lfs`: files of tensors go by LFS.
    `broken`: paths of files that cannot be downloaded. `on_commit`: called once before the next commit.
    """

    def __init__(self):
        self.repos, self.private, self.objects, self.requests = {}, {}, {}, []
        self.gated = self.forbidden = self.lfs = False
        self.broken, self.on_commit = set(), None

    def commit(self, repo, branch, changes):
        branches = self.repos[repo]
        files = {path: content for path, content in {**branches[branch][1], **changes}.items() if content is not None}
        sha = hashlib.sha1(repr((len(self.requests), sorted(files))).encode()).hexdigest()
        branches[branch] = branches[sha] = (sha, files)
        return sha

    def make(self, repo, private=False):
        self.repos[repo], self.private[repo] = {"main": ("", {})}, private
        self.commit(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def files(self, repo, branch="main"):
        return self.repos[repo][branch][1]


class RefusalError(Exception):
    def __init__(self, status, content=None, **headers):
        self.status, self.content = status, content or {"error": "refused"}
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@contextmanager
def loopback_hub():
    """Runs a hub; gives it, with its address as `url`."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            place = urlsplit(self.path)
            hub.requests.append((self.command, unquote(place.path)))
            try:
                self.respond(body, place.path)
            except RefusalError as refusal:
                self.answer(json.dumps(refusal.content).encode(), refusal.status, **refusal.headers)

        do_GET = do_HEAD = do_POST = do_PUT = do  # noqa: N815

        def answer(self, content, status=200, **headers):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def answer_json(self, content):
            self.answer(json.dumps(content).encode(), **{"Content-Type": "application/json"})

        def is_owner(self):
            given = self.headers.get("Authorization")
            if given not in (None, f"Bearer {TOKEN}"):
                raise RefusalError(401, X_Error_Message="Invalid credentials in Authorization header")
            return given is not None

        def check_writer(self):
            if not self.is_owner():
                raise RefusalError(401, X_Error_Message="Invalid username or password.")
            if hub.forbidden:
                raise RefusalError(403, X_Error_Message="You don't have the rights")

        def at(self, repo, revision):
            """The commit and the files."""
            owner = self.is_owner()
            if repo not in hub.repos or (hub.private[repo] and not owner):
                raise RefusalError(404 if owner else 401, X_Error_Code="RepoNotFound")
            if revision not in hub.repos[repo]:
                raise RefusalError(404, X_Error_Code="RevisionNotFound")
            return hub.repos[repo][revision]

        def respond(self, body, path):
            if path == "/api/repos/create":
                self.check_writer()
                facts = json.loads(body)
                repo = f"{facts['organization']}/{facts['name']}"
                where = {"url": f"{hub.url}/{repo}"}
                if repo in hub.repos:
                    raise RefusalError(409, where)
                hub.make(repo, facts.get("visibility") == "private")
                return self.answer_json(where)
            if path == "/api/validate-yaml":
                return self.answer_json({"errors": [], "warnings": []})
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?", path):
                return self.model(body, found[1], found[2] or "revision", unquote(found[3] or "main"))
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self.file(found[1], unquote(found[2]), unquote(found[3]))
            if path.endswith(".git/info/lfs/objects/batch"):
                self.check_writer()
                wanted = json.loads(body)["objects"]
                upload = [{**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}} for o in wanted]
                return self.answer_json({"transfer": "basic", "objects": upload})
            if path.startswith("/lfs/") and hashlib.sha256(body).hexdigest() == path[5:]:
                hub.objects[path[5:]] = body
                return self.answer(b"")
            raise RefusalError(404)

        def model(self, body, repo, what, revision):
            if what == "branch":
                self.check_writer()
                if revision in hub.repos[repo]:
                    raise RefusalError(409)
                hub.repos[repo][revision] = self.at(repo, "main")
                return self.answer_json({})
            sha, files = self.at(repo, revision)
            if what == "revision":
                names = [{"rfilename": name} for name in files]
                return self.answer_json({"id": repo, "sha": sha, "private": hub.private[repo], "siblings": names})
            if what == "tree":
                entries = [{"type": "file", "path": p, "size": len(c), "oid": blob(c)} for p, c in files.items()]
                return self.answer_json(entries)
            self.check_writer()
            if what == "preupload":
                given = [file["path"] for file in json.loads(body)["files"]]
                modes = {p: "lfs" if hub.lfs and p.endswith(".safetensors") else "regular" for p in given}
                known = {p: blob(files[p]) for p in given if p in files}
                answers = [
                    {"path": p, "uploadMode": modes[p], "shouldIgnore": False, "oid": known.get(p)} for p in given
                ]
                return self.answer_json({"files": answers})
            return self.take(repo, revision, [json.loads(line) for line in body.splitlines()])

        def take(self, repo, branch, lines):
            if hub.on_commit is not None:
                hub.on_commit, change = None, hub.on_commit
                change()
            changes = {}
            for line in lines:
                value = line["value"]
                if line["key"] == "header" and value.get("parentCommit") not in (None, hub.repos[repo][branch][0]):
                    raise RefusalError(412)
                if line["key"] == "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    changes[value["path"]] = hub.objects[value["oid"]]
                if line["key"] == "deletedFile":
                    assert value["path"] in hub.files(repo, branch)
                    changes[value["path"]] = None
            sha = hub.commit(repo, branch, changes)
            return self.answer_json({"commitUrl": f"{hub.url}/{repo}/commit/{sha}", "commitOid": sha})

        def file(self, repo, revision, path):
            sha, files = self.at(repo, revision)
            if hub.gated:
                raise RefusalError(403, X_Error_Code="GatedRepo")
            if path not in files:
                raise RefusalError(404, X_Error_Code="EntryNotFound")
            content, status = files[path], 200
            headers = {"ETag": f'"{blob(content)}"', "X-Repo-Commit": sha}
            if self.command == "GET" and path in hub.broken:
                raise RefusalError(418)
            if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
                start = int(found[1])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                content, status = content[start:], 206
            return self.answer(content, status, **headers)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
