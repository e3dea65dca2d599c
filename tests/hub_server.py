"""A server that speaks as much of the Hub's protocol as the real client asks for, with faults on request.

Files live in memory: `repos[id]` maps a branch to its commits, each a whole tree of files. `faults` maps the name of a
request (see `Handler.answer`) to what goes wrong with it; the server's user sets and clears it.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN = "hf_right"


class Hub:
    """The Hub's state, and the server in a thread of its own."""

    def __init__(self):
        self.repos, self.objects, self.faults, self.private = {}, {}, {}, set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def create(self, repo):
        """Make a repository with an empty first commit."""
        self.repos[repo] = {"main": []}
        self.commit(repo, "main", {})

    def files(self, repo, revision="main"):
        """(commit, tree) of a branch's head or of a commit; None where there is none."""
        branches = self.repos[repo]
        if revision in branches:
            return branches[revision][-1]
        return next((c for commits in branches.values() for c in commits if c[0] == revision), None)

    def commit(self, repo, branch, tree):
        """Add a commit and return its hash."""
        count = sum(map(len, self.repos[repo].values()))
        commit = hashlib.sha1(f"{repo} {count}".encode()).hexdigest()
        self.repos[repo][branch].append((commit, tree))
        return commit


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        """Say nothing."""

    def do_any(self):
        """Every method: read the body, then answer."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        if authorization not in (None, f"Bearer {TOKEN}"):
            self.fail(401, "", "Invalid credentials in Authorization header")
        elif self.command != "HEAD" and self.command != "GET" and not authorization and "/lfs/" not in self.path:
            self.fail(401, "", "Invalid username or password.")
        else:
            self.answer()

    do_GET = do_HEAD = do_POST = do_PUT = do_any

    def answer(self):
        """Find what is asked for."""
        for name, pattern in ROUTES.items():
            match = re.fullmatch(pattern, self.path)
            if match:
                if self.hub.faults.get(name) == "drop":
                    self.close_connection = True
                    self.connection.close()
                    return
                repo = match.groupdict().get("repo")
                if repo is not None and repo not in self.hub.repos:
                    self.fail(404, "RepoNotFound", "Repository not found")
                else:
                    getattr(self, name)(**match.groupdict())
                return
        self.fail(404, "", f"no such address: {self.path}")

    # --- answers ------------------------------------------------------------------------------------------------

    def create(self):
        values = json.loads(self.body)
        repo = f"{values['organization'] or 'someone'}/{values['name']}"
        is_new = repo not in self.hub.repos
        if is_new:
            self.hub.create(repo)
            if values.get("visibility") == "private" or values.get("private"):  # the client before 1.0
                self.hub.private.add(repo)
        self.reply({"url": f"{self.hub.url}/{repo}"}, 200 if is_new else 409)

    def branch(self, repo, branch):
        if branch in self.hub.repos[repo]:
            self.reply({}, 409)
            return
        self.hub.repos[repo][branch] = [self.hub.files(repo)]
        self.reply({})

    def validate(self):
        import yaml

        metadata = yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
        base = metadata.get("base_model", "none")
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
            self.reply({"warnings": [], "errors": []})
        else:
            self.reply({"warnings": [], "errors": [{"message": f'"base_model" {base} is no id'}]}, 400)

    def preupload(self, repo, revision):
        modes = {True: "lfs", False: "regular"}
        files = [
            {
                "path": f["path"],
                "uploadMode": modes[f["path"].endswith((".safetensors", ".bin"))],
                "shouldIgnore": False,
            }
            for f in json.loads(self.body)["files"]
        ]
        self.reply({"files": files})

    def batch(self, repo):
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}}
            for item in json.loads(self.body)["objects"]
        ]
        self.reply({"transfer": "basic", "objects": objects})

    def upload(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.objects[oid] = self.body
        self.reply({})

    def save(self, repo, revision):
        _, tree = self.hub.files(repo, revision)
        tree = dict(tree)
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                data = base64.b64decode(value["content"])
                tree[value["path"]] = (data, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())
            elif entry["key"] == "lfsFile":
                tree[value["path"]] = (self.hub.objects[value["oid"]], value["oid"])
        commit = self.hub.commit(repo, revision, tree)
        self.reply({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})

    def info(self, repo, revision=None):
        commit, tree = self.hub.files(repo, revision or "main")
        self.reply({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in tree]})

    def resolve(self, repo, revision, name):
        found = self.hub.files(repo, revision)
        if found is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        commit, tree = found
        headers = {"X-Repo-Commit": commit}
        if name not in tree:
            self.fail(404, "EntryNotFound", "Entry not found", headers)
            return
        data, etag = tree[name]
        headers |= {"ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        fault = self.hub.faults.get(name) if self.command == "GET" else None
        if fault == "damage":
            data = bytes([*data[:-1], data[-1] ^ 1])
        self.reply(data, 200, headers, sent=len(data) // 2 if fault == "truncate" else None)

    # --- the wire -----------------------------------------------------------------------------------------------

    def fail(self, status, code, message, headers=None):
        names = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self.reply({"error": message}, status, {name: value for name, value in names.items() if value})

    def reply(self, body, status=200, headers=None, sent=None):
        """Send; with `sent`, no more than so many bytes before the connection ends."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:sent])
        self.close_connection = self.close_connection or sent is not None


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = {
    "create": "/api/repos/create",
    "validate": "/api/validate-yaml",
    "branch": rf"/api/models/{_REPO}/branch/(?P<branch>.+)",
    "preupload": rf"/api/models/{_REPO}/preupload/(?P<revision>.+)",
    "save": rf"/api/models/{_REPO}/commit/(?P<revision>.+)",
    "info": rf"/api/models/{_REPO}(/revision/(?P<revision>.+))?",
    "batch": rf"/{_REPO}\.git/info/lfs/objects/batch",
    "upload": "/lfs/(?P<oid>[0-9a-f]+)",
    "resolve": rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)",
}
