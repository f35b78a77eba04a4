"""A server on this machine that speaks as much of the Hugging Face Hub's protocol as huggingface_hub needs to read models."""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Repository:
    """files: {name: bytes}. gated: whether files need the token "good". sent: {name: bytes}, sent in place of the files.

    drop_after: the connection is closed after so many bytes of a file, once. requests: what was asked, in order.
    """

    files: dict
    gated: bool = False
    sent: dict = dataclasses.field(default_factory=dict)
    drop_after: int = 0
    commit: str = COMMIT
    requests: list = dataclasses.field(default_factory=list)


def is_large(name):
    """Whether the Hub would store a file in LFS."""
    return not name.endswith((".json", ".md"))


def git_digest(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def digest(name, content):
    return hashlib.sha256(content).hexdigest() if is_large(name) else git_digest(content)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in {"Content_Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status, code, message):
        self._answer(status, b"{}", X_Error_Code=code, X_Error_Message=message)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/").split("/")
        is_api = path[:2] == ["api", "models"]
        path = path[2:] if is_api else path
        repository = self.server.repositories.get("/".join(path[:2]))
        if repository is None:
            return self._refuse(401, "RepoNotFound", "Repository not found")
        repository.requests.append((self.command, self.path, self.headers.get("Range")))
        kind, revision, *names = path[2:] or ["revision", "main"]
        if revision not in ("main", "v1", repository.commit):
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        if is_api:
            return self._answer(200, json.dumps(self._describe(kind, repository)).encode())
        return self._send_file(repository, "/".join(names))

    def do_PUT(self):
        self.server.uploaded[self.path.rpartition("/")[2]] = self._body()
        self._answer(200)

    def do_POST(self):
        """Creates a repository, or takes a commit: small files in it, large ones by their digests."""
        if self.headers.get("Authorization") != "Bearer good":
            return self._refuse(401, "", "Invalid username or password.")
        path, body = urllib.parse.urlsplit(self.path).path, self._body()
        name = "/".join(
            path.removeprefix("/api/models").strip("/").removesuffix(".git/info/lfs/objects/batch").split("/")[:2]
        )
        repository, url = self.server.repositories.get(name), f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.server.repositories.setdefault(name, Repository({}))
            answer = {"url": f"{url}/{name}"}
        elif path.endswith("/objects/batch"):
            put = {"upload": {"href": f"{url}/put/", "header": {}}}
            objects = [
                dict(each, actions={"upload": {"href": put["upload"]["href"] + each["oid"]}})
                for each in json.loads(body)["objects"]
            ]
            answer = {"transfer": "basic", "objects": objects}
        elif "/preupload/" in path:
            modes = [
                (each["path"], "lfs" if is_large(each["path"]) else "regular") for each in json.loads(body)["files"]
            ]
            answer = {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]}
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repository.files[value["path"]] = self.server.uploaded[value["oid"]]
            answer = {"success": True, "commitOid": COMMIT, "commitUrl": f"{url}/{name}/commit/{COMMIT}"}
        else:  # validate-yaml
            answer = {"errors": [], "warnings": []}
        self._answer(200, json.dumps(answer).encode(), Content_Type="application/json")

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _describe(self, kind, repository):
        files = []
        for name, content in repository.files.items():
            lfs = {"oid": digest(name, content), "size": len(content), "pointerSize": 134} if is_large(name) else None
            files.append({"type": "file", "path": name, "size": len(content), "oid": git_digest(content), "lfs": lfs})
            if lfs is None:
                del files[-1]["lfs"]
        if kind == "tree":
            return files
        siblings = [{"rfilename": f["path"], "size": f["size"], "blobId": f["oid"]} for f in files]
        for sibling, file in zip(siblings, files, strict=True):
            if "lfs" in file:
                sibling["lfs"] = {"sha256": file["lfs"]["oid"], "size": file["size"], "pointerSize": 134}
        return {"id": "a/b", "modelId": "a/b", "sha": repository.commit, "siblings": siblings, "tags": []}

    def _send_file(self, repository, name):
        if repository.gated and self.headers.get("Authorization") != "Bearer good":
            return self._refuse(403, "GatedRepo", "Access to model a/b is restricted")
        if name not in repository.files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        content = repository.sent.get(name, repository.files[name])
        headers = {"ETag": f'"{digest(name, repository.files[name])}"', "X_Repo_Commit": repository.commit}
        headers |= {"Accept_Ranges": "bytes"}
        if self.command == "GET" and (range_ := self.headers.get("Range")):
            start = int(range_.removeprefix("bytes=").split("-")[0])
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self._answer(206, content[start:], **headers)
        if self.command == "GET" and is_large(name) and 0 < repository.drop_after < len(content):
            cut, repository.drop_after = repository.drop_after, 0
            self._answer(200, content[:cut], Content_Length=str(len(content)), **headers)
            self.close_connection = True
            return self.connection.shutdown(1)
        return self._answer(200, content, **headers)


@contextlib.contextmanager
def hub_server(**repositories):
    """Runs a server with repositories, {"a/b": Repository}; yields its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.repositories, server.uploaded = repositories, {}
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
