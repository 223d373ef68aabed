"""data/download.py with the real huggingface_hub client against a small hub on the loopback interface."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from test_data_helpers import DATA, toy_model

import download  # isort: skip
import shards  # isort: skip
import variants  # isort: skip

REPOSITORY = "someone/some-data"
REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A hub-like server: dataset info, tree listing with sizes and LFS hashes, files with Range. Faults can be planted."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}  # path in the repository -> content
        self.served: dict[str, bytes] = {}  # what is served instead of it
        self.drop_after: dict[str, list[int]] = {}  # path -> bytes after which the connection drops, per request
        self.requests: list[tuple[str, str | None]] = []  # (path, Range header) of every file request
        self.small: set[str] = set()  # kept in git itself: the listing has no SHA-256
        self.token: str | None = None  # needed when set
        self.stalled = threading.Event()  # set: a connection that dropped bytes closes at once, else it stalls first
        self.stalled.set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(request.path).path)
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return self.send(request, 401, b"{}", {"X-Error-Code": "GatedRepo"})
        if path == f"/api/datasets/{REPOSITORY}":
            return self.send_json(request, {"id": REPOSITORY, "sha": REVISION})
        if path.startswith(tree := f"/api/datasets/{REPOSITORY}/tree/{REVISION}"):
            return self.send_tree(request, path.removeprefix(tree).strip("/"))
        if path.startswith(files := f"/datasets/{REPOSITORY}/resolve/{REVISION}/"):
            return self.send_file(request, path.removeprefix(files))
        return self.send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def send_tree(self, request: BaseHTTPRequestHandler, folder: str) -> None:
        entries = []
        for path, content in self.files.items():
            if path.rpartition("/")[0] == folder:
                git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
                entry = {"type": "file", "path": path, "size": len(content), "oid": git}
                entries.append(entry if path in self.small else entry | {"lfs": lfs})
        if not entries:
            return self.send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})
        return self.send_json(request, entries)

    def send_file(self, request: BaseHTTPRequestHandler, path: str) -> None:
        wanted = request.headers.get("Range")
        self.requests.append((path, wanted))
        if path not in self.files or self.served.get(path) == b"":
            return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        content = self.served.get(path, self.files[path])
        begin = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        status, headers = (
            (206, {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}) if wanted else (200, {})
        )
        drops = self.drop_after.get(path)
        return self.send(request, status, content[begin:], headers, drops.pop(0) if drops else None)

    def send_json(self, request: BaseHTTPRequestHandler, value: object) -> None:
        self.send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(
        self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict, drop_after: int | None = None
    ) -> None:
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[:drop_after])
        if drop_after is not None:
            request.wfile.flush()
            self.stalled.wait(30)
            request.close_connection = True


def make_shard(num_tokens: int, seed: int) -> bytes:
    tokens = np.random.default_rng(seed).integers(3, 800, num_tokens).astype(np.uint16)
    tokens[0] = shards.BOS_ID
    return np.array([shards.MAGIC, shards.VERSION, num_tokens] + [0] * 253, "<i4").tobytes() + tokens.tobytes()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that publishes a made-up variant `toy` with three training shards, a side-car and a document list."""
    hub = Hub()
    base, name = "datasets/datasets/toy_set", "datasets/tokenizers/toy.model"
    for index in range(3):
        hub.files[f"{base}/fineweb_train_{index:06d}.bin"] = make_shard(20_000, index)
    hub.files[f"{base}/fineweb_val_000000.bin"] = make_shard(5_000, 10)
    hub.files[f"{base}/fineweb_val_bytes_000000.bin"] = make_shard(5_000, 11)
    hub.files[name] = toy_model()
    hub.files["datasets/docs_selected.jsonl"] = b'{"text": "one"}\n'
    hub.files["datasets/docs_selected.source_manifest.json"] = b"{}"
    hub.small.add("datasets/docs_selected.source_manifest.json")
    toy = variants.Variant(REPOSITORY, "toy_set", "toy.model", 800, caseops=True)
    monkeypatch.setitem(variants.VARIANTS, "toy", toy)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    for key in ("MATCHED_FINEWEB_REPO_ID", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "HF_TOKEN"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(download.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # The client writes, and so can resume, in steps of 10 MB: more than a toy file has.
    monkeypatch.setattr(download.huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(
        download.time, "sleep", lambda seconds: None
    )  # shared by the hub's client: no waiting between attempts
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


TRAIN_1 = "datasets/datasets/toy_set/fineweb_train_000001.bin"


def fetch(root, train_shards="2", **options):
    return download.download("toy", train_shards, root, **options)


def visible_files(root):
    """Names under ROOT that a reader would take for data."""
    return sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and ".part" not in path.as_posix()
    )


def assert_equal_to_hub(hub, root):
    for path in visible_files(root):
        if not path.endswith("SOURCE.json"):
            assert (root / path).read_bytes() == hub.files[f"datasets/{path}"], path


def test_full_download_is_exact_and_recorded(hub, tmp_path):
    record = fetch(tmp_path)
    names = [
        f"datasets/toy_set/fineweb_{name}.bin"
        for name in ("train_000000", "train_000001", "val_000000", "val_bytes_000000")
    ]
    assert visible_files(tmp_path) == ["datasets/toy_set/SOURCE.json", *names, "tokenizers/toy.model"]
    assert_equal_to_hub(hub, tmp_path)
    assert (record["repository"], record["revision"], record["train_shards"]) == (REPOSITORY, REVISION, 2)
    for name, facts in record["files"].items():
        assert facts["sha256"] == shards.file_sha256(tmp_path / "datasets/toy_set" / name)
    assert not (tmp_path / "datasets/toy_set.part").exists()


def test_running_again_fetches_nothing_and_more_shards_fetch_only_those(hub, tmp_path):
    fetch(tmp_path)
    hub.requests.clear()
    fetch(tmp_path)
    assert hub.requests == []
    record = fetch(tmp_path, "all")
    assert [path.rpartition("/")[2] for path, _ in hub.requests] == ["fineweb_train_000002.bin"]
    assert record["train_shards"] == 3
    assert_equal_to_hub(hub, tmp_path)
    hub.requests.clear()
    fetch(tmp_path, "all", full=True)
    assert hub.requests == []


def test_connection_dropped_in_mid_file_resumes_with_a_range(hub, tmp_path):
    hub.drop_after[TRAIN_1] = [30_000]
    fetch(tmp_path)
    assert [wanted for path, wanted in hub.requests if path == TRAIN_1] == [None, "bytes=30000-"]
    assert_equal_to_hub(hub, tmp_path)


def test_a_run_that_broke_off_goes_on_in_mid_file(hub, tmp_path):
    """Every connection drops at once until all attempts are used up; the next run asks for the rest only."""
    hub.drop_after[TRAIN_1] = [12_000] + [0] * 100
    with pytest.raises(shards.DataError, match="run the same command again"):
        fetch(tmp_path)
    assert visible_files(tmp_path) == []
    hub.drop_after.clear()
    hub.requests.clear()
    fetch(tmp_path)
    assert hub.requests == [(TRAIN_1, "bytes=12000-")]  # and nothing that had arrived
    assert_equal_to_hub(hub, tmp_path)


def test_a_killed_process_leaves_nothing_that_passes_for_data(hub, tmp_path):
    """The state a kill leaves (half a file under its temporary name) is taken up by the next run."""
    staging = tmp_path / "datasets/toy_set.part"
    shards.write_json(staging / "SOURCE.json", {"repository": REPOSITORY, "revision": REVISION})
    (staging / "fineweb_train_000001.bin.part").write_bytes(hub.files[TRAIN_1][:777])
    fetch(tmp_path)
    assert [wanted for path, wanted in hub.requests if path == TRAIN_1] == ["bytes=777-"]
    assert_equal_to_hub(hub, tmp_path)


def test_the_program_killed_in_mid_file_goes_on_when_started_again(hub, tmp_path):
    """The real command line against the made-up repository under a published name, killed without warning."""
    dataset, name = "datasets/datasets/fineweb10B_sp1024", "fineweb_train_000000.bin"
    hub.files = {f"{dataset}/{name}": make_shard(6_000_000, 1), f"{dataset}/fineweb_val_000000.bin": make_shard(5_000, 2),
                 "datasets/tokenizers/fineweb_1024_bpe.model": toy_model()}  # fmt: skip
    hub.stalled.clear()
    hub.drop_after[f"{dataset}/{name}"] = [11_500_000]
    written = 10 << 20  # the client writes in steps of 10 MiB
    command = [sys.executable, DATA / "download.py", "sp1024", "--train-shards", "1", "--root", tmp_path]
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "MATCHED_FINEWEB_REPO_ID": REPOSITORY,
        "HF_HUB_OFFLINE": "0",
    }
    program = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = tmp_path / "datasets/fineweb10B_sp1024.part" / f"{name}.part"
    deadline = time.monotonic() + 20
    while not (part.is_file() and part.stat().st_size >= written) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    program.kill()
    program.wait()
    hub.stalled.set()
    assert part.stat().st_size == written
    assert not (tmp_path / "datasets/fineweb10B_sp1024").exists()
    hub.requests.clear()
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (f"{dataset}/{name}", f"bytes={written}-") in hub.requests
    assert_equal_to_hub(hub, tmp_path)
    assert "nothing to do" in subprocess.run(command, env=environment, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda good: good[:-2] + bytes([good[-2] ^ 1, good[-1]]), "SHA-256|hash"),  # one bit
        (lambda good: b"<html>" + bytes(len(good) - 6), "a web page"),
        (lambda good: b"<html>Too many requests</html>", "bytes beginning b'<html>"),
        (lambda good: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-lfs"),
        (lambda good: good + b"\0\0", "bytes"),
    ],
    ids=["flipped bit", "web page of the same size", "web page", "LFS pointer", "too long"],
)
def test_wrong_content_is_named_and_not_kept(hub, tmp_path, content, message):
    hub.served[TRAIN_1] = content(hub.files[TRAIN_1])
    with pytest.raises(shards.DataError, match=message) as error:
        fetch(tmp_path)
    assert "fineweb_train_000001.bin" in str(error.value)
    assert not list(tmp_path.rglob("fineweb_train_000001.bin*"))
    assert visible_files(tmp_path) == []
    hub.served.clear()
    fetch(tmp_path)
    assert_equal_to_hub(hub, tmp_path)


def test_half_a_file_from_elsewhere_is_found_by_its_hash(hub, tmp_path):
    """Planted fault for the resume: the bytes already there are not those of the file."""
    staging = tmp_path / "datasets/toy_set.part"
    shards.write_json(staging / "SOURCE.json", {"repository": REPOSITORY, "revision": REVISION})
    (staging / "fineweb_train_000001.bin.part").write_bytes(hub.files[TRAIN_1][:1024] + b"x" * 500)
    with pytest.raises(shards.DataError, match="hash"):
        fetch(tmp_path)
    fetch(tmp_path)
    assert_equal_to_hub(hub, tmp_path)


def test_missing_file_and_missing_variant_and_missing_repository(hub, tmp_path, monkeypatch):
    hub.served[TRAIN_1] = b""
    with pytest.raises(shards.DataError, match="fineweb_train_000001.bin: found not in the repository"):
        fetch(tmp_path)
    del hub.files[TRAIN_1]
    with pytest.raises(shards.DataError, match="train shards .* expected numbers 0, 1, 2"):
        fetch(tmp_path)
    monkeypatch.setitem(variants.VARIANTS, "toy", variants.Variant(REPOSITORY, "other_set", "toy.model", 800))
    with pytest.raises(shards.DataError, match="lacks the variant"):
        fetch(tmp_path)
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "no/where")
    with pytest.raises(shards.DataError, match="no such repository"):
        fetch(tmp_path / "elsewhere")
    assert visible_files(tmp_path) == []


def test_repository_that_needs_a_token(hub, tmp_path, monkeypatch):
    hub.token = "secret"
    with pytest.raises(shards.DataError, match="set HF_TOKEN"):
        fetch(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch(tmp_path)
    assert_equal_to_hub(hub, tmp_path)


def test_too_many_shards_and_bad_numbers_are_refused(hub, tmp_path):
    with pytest.raises(shards.DataError, match="3 train shards .* --train-shards 3, or all"):
        fetch(tmp_path, "4")
    for bad in ("0", "-1", "many"):
        with pytest.raises(shards.DataError, match="--train-shards"):
            fetch(tmp_path, bad)
    with pytest.raises(shards.DataError, match="sp8192"):
        download.download("sp8129", "1", tmp_path)
    with pytest.raises(shards.DataError, match="data/fuse.py"):
        download.download("mp3", "1", tmp_path)


def test_disk_too_small_is_refused_before_the_first_byte(hub, tmp_path, monkeypatch, capsys):
    needed = sum(
        len(content) for path, content in hub.files.items() if "train_000002" not in path and "docs_" not in path
    )
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(0, 0, int(needed * 1.1) - 1))
    with pytest.raises(shards.DataError, match="fewer --train-shards"):
        fetch(tmp_path)
    assert hub.requests == []
    assert f"to_fetch_bytes:{needed}" in capsys.readouterr().out
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(0, 0, int(needed * 1.1)))
    fetch(tmp_path)


def test_mixed_and_damaged_folders_are_refused(hub, tmp_path, monkeypatch):
    fetch(tmp_path)
    folder = tmp_path / "datasets/toy_set"
    victim = folder / "fineweb_train_000001.bin"
    good = victim.read_bytes()
    victim.write_bytes(good[:-2])
    with pytest.raises(shards.DataError, match="delete it and run the same command again"):
        fetch(tmp_path)
    victim.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(shards.DataError, match="hash"):
        fetch(tmp_path, full=True)
    victim.unlink()
    fetch(tmp_path)  # a lost file is fetched again
    assert victim.read_bytes() == good
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "another/repository")
    with pytest.raises(shards.DataError, match="data from someone/some-data"):
        fetch(tmp_path)
    monkeypatch.delenv("MATCHED_FINEWEB_REPO_ID")
    (folder / "SOURCE.json").unlink()
    (folder / "fineweb_train_000077.bin").write_bytes(good)
    with pytest.raises(shards.DataError, match="fineweb_train_000077.bin, which is not part"):
        fetch(tmp_path)
    (folder / "fineweb_train_000077.bin").unlink()
    fetch(tmp_path)  # files that prove to be the published ones are taken over
    victim.write_bytes(make_shard(20_000, 99))
    (folder / "SOURCE.json").unlink()
    with pytest.raises(shards.DataError, match="hash"):
        fetch(tmp_path)


def test_another_tokenizer_in_place_is_refused(hub, tmp_path, monkeypatch):
    fetch(tmp_path)
    (tmp_path / "tokenizers/toy.model").write_bytes(b"other")
    with pytest.raises(shards.DataError, match="another tokenizer"):
        fetch(tmp_path)
    toy = variants.Variant(REPOSITORY, "toy_set", "toy.model", 800, caseops=True, tokenizer_sha256="0" * 64)
    monkeypatch.setitem(variants.VARIANTS, "toy", toy)
    with pytest.raises(shards.DataError, match="not the published tokenizer"):
        fetch(tmp_path / "elsewhere")


def test_documents_come_along_and_git_hashes_are_checked(hub, tmp_path):
    fetch(tmp_path, with_docs=True)
    assert (tmp_path / "docs_selected.jsonl").read_bytes() == b'{"text": "one"}\n'
    hub.requests.clear()
    fetch(tmp_path, with_docs=True)
    assert hub.requests == []
    hub.served["datasets/docs_selected.source_manifest.json"] = b"[]"
    with pytest.raises(shards.DataError, match="source_manifest.json: found hash"):
        fetch(tmp_path / "elsewhere", with_docs=True)


def test_plain_folder_and_mirror_of_the_hub(hub, tmp_path):
    fetch(tmp_path / "first", "all")
    record = fetch(tmp_path / "second", folder=tmp_path / "first")
    assert record["train_shards"] == 2
    assert_equal_to_hub(hub, tmp_path / "second")
    for path, content in hub.files.items():
        (tmp_path / "mirror" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mirror" / path).write_bytes(content)
    fetch(tmp_path / "third", folder=tmp_path / "mirror")
    assert_equal_to_hub(hub, tmp_path / "third")
    with pytest.raises(shards.DataError, match="check --from"):
        fetch(tmp_path / "fourth", folder=tmp_path / "nothing")


def test_offline_uses_the_cache_of_the_hub_client(hub, tmp_path, monkeypatch):
    """A cache laid out as the client does; the real client finds it, and the server is not asked."""
    cache = tmp_path / "cache"
    snapshot = cache / "datasets--someone--some-data" / "snapshots" / REVISION
    for path, content in hub.files.items():
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).write_bytes(content)
    (cache / "datasets--someone--some-data" / "refs").mkdir()
    (cache / "datasets--someone--some-data" / "refs" / "main").write_text(REVISION)
    monkeypatch.setattr(download.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    snapshot_download = download.huggingface_hub.snapshot_download
    monkeypatch.setattr(
        download.huggingface_hub, "snapshot_download", lambda *a, **k: snapshot_download(*a, cache_dir=cache, **k)
    )
    record = fetch(tmp_path / "root")
    assert (record["repository"], record["revision"]) == (REPOSITORY, REVISION)
    assert hub.requests == []
    assert_equal_to_hub(hub, tmp_path / "root")
    shutil.rmtree(cache)
    with pytest.raises(shards.DataError, match="unset HF_HUB_OFFLINE"):
        fetch(tmp_path / "empty")


def test_another_root_folder_of_the_repository(hub, tmp_path, monkeypatch):
    hub.files = {path.replace("datasets/", "export/", 1): content for path, content in hub.files.items()}
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "export")
    fetch(tmp_path)
    assert (tmp_path / "tokenizers/toy.model").read_bytes() == hub.files["export/tokenizers/toy.model"]


def test_bad_command_lines_end_with_one_line_and_status_2(tmp_path):
    result = subprocess.run(
        [sys.executable, DATA / "download.py", "sp123", "--root", tmp_path], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: variant: found 'sp123'") and result.stderr.count("\n") == 1
