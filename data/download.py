"""Fetch a published variant of the challenge's data: shards and tokenizer, checked, resumable.

    python data/download.py sp8192 [--train-shards 80|all] [--root data] [--with-docs]
        [--verify fast|full] [--from FOLDER]

Files are written to ROOT/datasets/NAME.part, checked there (size, hash, shard header), and moved to ROOT/datasets/NAME
when all of them are complete. An interrupted run continues where it stopped, also in the middle of a file. SOURCE.json
beside the shards records where they came from. A second run with everything in place downloads nothing.

Environment: MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX choose another repository and folder in it;
HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE (use the hub's cache only) are those of huggingface_hub.
"""

import argparse
import datetime
import functools
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import httpx2  # the client that huggingface_hub is built on
import huggingface_hub
import shards
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import http_get
from shards import DataError
from variants import Variant, find_variant

PARALLEL_FILES = 8
SPARE_FRAC = 0.10  # of the transfer, left free on the disk
ATTEMPTS = 5  # per file, after the retries of the hub's own client; waits 1, 2, 4, 8 s
DOCUMENT_FILES = ("docs_selected.jsonl", "docs_selected.source_manifest.json")
SHARD_NAME = re.compile(r"fineweb_(train|val|val_bytes)_(\d{6})\.bin")


@dataclass(frozen=True)
class RemoteFile:
    path: str  # inside the source
    size: int  # bytes
    sha256: str | None = None  # large files; the hub knows small ones by their git hash only
    git_sha1: str | None = None

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch a published variant of the challenge's data.")
    parser.add_argument("variant", help="sp1024, sp4096, sp8192 or caseops")
    parser.add_argument(
        "--train-shards", default="80", help="how many, or all (default 80; one holds 100,000,000 tokens, 200 MB)"
    )
    parser.add_argument(
        "--root", type=Path, default=Path("data"), help="folder for datasets/ and tokenizers/ (default data)"
    )
    parser.add_argument("--with-docs", action="store_true", help="also fetch the document list (45 GiB)")
    parser.add_argument("--verify", choices=("fast", "full"), default="fast",
                        help="files already there: size and header (fast) or hash (full)")  # fmt: skip
    parser.add_argument(
        "--from", type=Path, dest="folder", metavar="FOLDER", help="a folder with the files instead of the hub"
    )
    options = parser.parse_args()
    huggingface_hub.utils.disable_progress_bars()  # one line per file instead of a bar per thread
    download(
        options.variant, options.train_shards, options.root, options.with_docs, options.verify == "full", options.folder
    )


def download(name: str, train_shards: str, root: Path, with_docs: bool = False, full: bool = False,
             folder: Path | None = None) -> dict:  # fmt: skip
    """Make ROOT hold the variant; returns the content of SOURCE.json. Raises DataError with the fix in it.

    train_shards: a number or "all". full: hash the files that are already there. folder: take the files from here.
    """
    short, variant = find_variant(name)
    if train_shards != "all" and not (train_shards.isdecimal() and int(train_shards) >= 1):
        raise DataError(
            "--train-shards", repr(train_shards), "a number from 1 on, or all", "for example --train-shards 10"
        )
    target = Target(short, variant, Path(root))
    source = open_source(short, variant, folder)
    target.check_origin(source.repository)
    record = target.finished(train_shards, with_docs)
    if record is not None:
        target.check_existing(record, full)
        print(f"complete:{target.folder} train_shards:{record['train_shards']} nothing to do")
        return record
    revision = target.pin(source.repository, source.revision)
    available = source.list(revision, f"datasets/{variant.dataset}")
    wanted = choose_shards(short, variant, source.repository, available, train_shards)
    places = {target.folder / file.name: source.identify(file) for file in wanted}
    places |= {target.tokenizer: find_file(source, revision, "tokenizers", variant.tokenizer)}
    if with_docs:
        places |= {target.root / name: find_file(source, revision, "", name) for name in DOCUMENT_FILES}
    if variant.tokenizer_sha256 not in (None, places[target.tokenizer].sha256):
        found = f"hash {places[target.tokenizer].sha256} in {source.repository}"
        fix = "this is not the published tokenizer: use the published repository"
        raise DataError(target.tokenizer, found, variant.tokenizer_sha256, fix)
    missing = target.missing(places, full)
    check_disk(target.root, sum(file.size - target.arrived(place) for place, file in missing.items()), len(missing))
    fetch_all(
        {target.staged(place): file for place, file in missing.items()},
        lambda file, part: source.fetch(revision, file, part),
    )
    num_available = sum(file.name.startswith("fineweb_train_") for file in available)
    return target.finish(places, source.repository, revision, num_available)


def choose_shards(
    short: str, variant: Variant, repository: str, available: list[RemoteFile], train_shards: str
) -> list[RemoteFile]:
    """The shards to fetch: all of validation (and the side-car), the first of training. Checks the numbering."""
    chosen = []
    for split in ("val", "val_bytes", "train") if variant.caseops else ("val", "train"):
        of_split = [file for file in available if (match := SHARD_NAME.fullmatch(file.name)) and match[1] == split]
        found = sorted(of_split, key=lambda file: file.name)
        names = [file.name for file in found]
        if not found or names != [f"fineweb_{split}_{index:06d}.bin" for index in range(len(found))]:
            raise DataError(f"{repository}: datasets/{variant.dataset}", f"{split} shards {names[:3] or 'none'}",
                            "numbers 0, 1, 2, ...", f"variant {short} is published in {variant.repository}: "
                            "unset MATCHED_FINEWEB_REPO_ID, or fix --from")  # fmt: skip
        wanted = len(found) if split != "train" or train_shards == "all" else int(train_shards)
        if wanted > len(found):
            raise DataError(
                "--train-shards",
                f"{len(found)} train shards in {repository}",
                f"{wanted}",
                f"--train-shards {len(found)}, or all",
            )
        chosen += found[:wanted]
    return chosen


def find_file(source: "Source", revision: str, folder: str, name: str) -> RemoteFile:
    for file in source.list(revision, folder):
        if file.name == name:
            return source.identify(file)
    raise DataError(
        f"{source.repository}: {folder or '.'}", f"no {name}", "it", "choose the repository that publishes it"
    )


def check_disk(root: Path, num_bytes: int, num_files: int) -> None:
    """Print what will be fetched; raises DataError when the disk is too small for it and 10 %."""
    root.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(root).free, int(num_bytes * (1 + SPARE_FRAC))
    print(f"to_fetch_files:{num_files} to_fetch_bytes:{num_bytes} needed_bytes:{needed} free_bytes:{free}")
    if free < needed:
        raise DataError(
            root,
            f"{free:,} bytes free",
            f"{needed:,} ({num_bytes:,} to fetch and 10 %)",
            "free some space, choose another --root, or ask for fewer --train-shards",
        )


# ---------------------------------------------------------------------------------------------------------------------
# Where the files end up


class Target:
    """The local side: ROOT/datasets/NAME and its staging folder, ROOT/tokenizers, SOURCE.json."""

    def __init__(self, short: str, variant: Variant, root: Path):
        self.short, self.variant, self.root = short, variant, root
        self.folder = root / "datasets" / variant.dataset
        self.staging = shards.temporary(self.folder)
        self.tokenizer = root / "tokenizers" / variant.tokenizer
        self.source_file = self.folder / "SOURCE.json"

    def staged(self, place: Path) -> Path:
        """Path of a file until all files are complete."""
        return self.staging / place.name

    def arrived(self, place: Path) -> int:
        """Bytes of a partly downloaded file that an interrupted run left."""
        part = shards.temporary(self.staged(place))
        return part.stat().st_size if part.is_file() else 0

    def check_origin(self, repository: str) -> None:
        """Raise DataError when files that are there, complete or partly, came from another repository."""
        for folder in (self.folder, self.staging):
            if (folder / "SOURCE.json").is_file():
                recorded = shards.read_json(folder / "SOURCE.json").get("repository")
                if recorded != repository:
                    raise DataError(
                        folder,
                        f"data from {recorded}",
                        f"data from {repository}",
                        "choose another --root, or delete the folder",
                    )

    def pin(self, repository: str, latest: Callable[[], str]) -> str:
        """The revision to fetch: that of the files already there, else the latest; remembered for the next run."""
        for folder in (self.folder, self.staging):
            if (folder / "SOURCE.json").is_file():
                return shards.read_json(folder / "SOURCE.json")["revision"]
        revision = latest()
        shards.write_json(self.staging / "SOURCE.json", {"repository": repository, "revision": revision})
        return revision

    def finished(self, train_shards: str, with_docs: bool) -> dict | None:
        """SOURCE.json when it covers the request and every file is in its place, else None."""
        if not self.source_file.is_file():
            return None
        record = shards.read_json(self.source_file)
        wanted = record["train_shards_available"] if train_shards == "all" else int(train_shards)
        places = [self.folder / name for name in record["files"]] + [self.tokenizer]
        places += [self.root / name for name in DOCUMENT_FILES] if with_docs else []
        return record if record["train_shards"] >= wanted and all(path.is_file() for path in places) else None

    def check_existing(self, record: dict, full: bool) -> None:
        for name, facts in record["files"].items():
            check_file(self.folder / name, RemoteFile(name, **facts), full)
        if shards.file_sha256(self.tokenizer) != record["tokenizer_sha256"]:
            raise DataError(
                self.tokenizer,
                "another tokenizer",
                f"SHA-256 {record['tokenizer_sha256']}",
                "delete it and run the same command again, or choose another --root",
            )

    def missing(self, places: dict[Path, RemoteFile], full: bool) -> dict[Path, RemoteFile]:
        """The files that are not there yet. Others are checked, by hash if SOURCE.json does not list them."""
        vouched = shards.read_json(self.source_file)["files"] if self.source_file.is_file() else {}
        strangers = (
            {path.name for path in self.folder.glob("fineweb_*")} - {place.name for place in places} - set(vouched)
        )
        if strangers:
            raise DataError(
                self.folder,
                f"{min(strangers)}, which is not part of this download",
                "an empty folder, or this variant's files",
                "choose another --root, or delete the folder",
            )
        missing = {}
        for place, file in places.items():
            if place.is_file():
                check_file(place, file, full or place.name not in vouched)
            elif not self.staged(place).is_file():
                missing[place] = file
        return missing

    def finish(self, places: dict[Path, RemoteFile], repository: str, revision: str, num_available: int) -> dict:
        """Move everything into its place; SOURCE.json goes last."""
        for place in places:
            if self.staged(place).is_file():
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.staged(place), place)
        files = shards.read_json(self.source_file)["files"] if self.source_file.is_file() else {}
        for file in places.values():
            if SHARD_NAME.fullmatch(file.name):
                files[file.name] = {"size": file.size, "sha256": file.sha256, "git_sha1": file.git_sha1}
        record = {
            "variant": self.short,
            "repository": repository,
            "revision": revision,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "tokenizer": os.path.relpath(self.tokenizer, self.folder),
            "tokenizer_sha256": shards.file_sha256(self.tokenizer),
            "vocab_size": self.variant.vocab_size,
            "caseops": self.variant.caseops,
            "mp3": self.variant.mp3,
            "train_shards": sum(name.startswith("fineweb_train_") for name in files),
            "train_shards_available": num_available,
            "files": files,
        }
        shards.write_json(self.source_file, record)
        shutil.rmtree(self.staging, ignore_errors=True)
        print(
            f"complete:{self.folder} train_shards:{record['train_shards']} repository:{repository} revision:{revision}"
        )
        print(f"next:python data/verify.py {self.folder}")
        return record


def check_file(path: Path, expected: RemoteFile, full: bool) -> None:
    """Raise DataError unless the file has its size, its shard header and (full) its hash."""
    again = "delete it and run the same command again"
    size = path.stat().st_size
    if size != expected.size:
        with path.open("rb") as file:
            head = file.read(40)
        raise DataError(path, f"{size:,} bytes beginning {head!r}", f"{expected.size:,} bytes", again)
    if SHARD_NAME.fullmatch(expected.name):
        shards.check_header(path)
    if full and (found := content_hash(path, expected)) != (expected.sha256 or expected.git_sha1):
        raise DataError(path, f"hash {found}", expected.sha256 or expected.git_sha1, again)


def content_hash(path: Path, expected: RemoteFile) -> str:
    """SHA-256, or git's hash of the content where only that is known."""
    if expected.sha256 is not None:
        return shards.file_sha256(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Transfer


def fetch_all(places: dict[Path, RemoteFile], fetch: Callable[[RemoteFile, Path], None]) -> None:
    """Fetch in parallel; each file gets its name only after its check. The first error stops the rest."""
    started, arrived, total = time.perf_counter(), 0, sum(file.size for file in places.values())
    pool = ThreadPoolExecutor(PARALLEL_FILES)
    try:
        running = {pool.submit(fetch_one, place, file, fetch): file for place, file in places.items()}
        num_done = 0
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                file = running.pop(future)
                arrived, num_done = arrived + file.size, num_done + 1
                print(f"fetched:{num_done}/{len(places)} file:{file.name} bytes:{arrived}/{total} "
                      f"mb_per_s:{arrived / 1e6 / (time.perf_counter() - started):.1f}", file=sys.stderr)  # fmt: skip
    finally:
        pool.shutdown(cancel_futures=True)


def fetch_one(place: Path, file: RemoteFile, fetch: Callable[[RemoteFile, Path], None]) -> None:
    """Fetch into PLACE.part, continuing an interrupted download; check; rename. A bad file is deleted."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part = shards.temporary(place)
    patiently(lambda: fetch(file, part), file.path)
    try:
        check_file(part, file, full=True)
    except DataError as error:
        part.unlink()
        _, *rest, _ = error.args
        raise DataError(
            file.path, *rest, "the bad copy was deleted; run the same command again, or check the repository"
        ) from error
    os.replace(part, place)


def patiently(action: Callable[[], Any], about: str) -> Any:
    """The action's result. Connection and server errors are retried several times, then they raise DataError."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except (httpx2.TransportError, HfHubHTTPError) as error:
            if attempt == ATTEMPTS:
                raise DataError(
                    about,
                    f"{type(error).__name__}: {error}",
                    "an answer from the hub",
                    "check the network and HF_ENDPOINT, then run the same command again: it goes on from here",
                ) from error
            time.sleep(2 ** (attempt - 1))


class Source(Protocol):
    """Somewhere that publishes files under `datasets/` and `tokenizers/`."""

    repository: str

    def revision(self) -> str: ...

    def list(self, revision: str, folder: str) -> list[RemoteFile]: ...

    def identify(self, file: RemoteFile) -> RemoteFile:
        """The file with its hash."""

    def fetch(self, revision: str, file: RemoteFile, part: Path) -> None: ...


def open_source(short: str, variant: Variant, folder: Path | None) -> Source:
    """The hub, its cache (HF_HUB_OFFLINE), or a plain folder."""
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
    if folder is not None:
        return FolderSource(f"folder {folder.name}", "unknown", folder, prefix)
    repository = os.environ.get("MATCHED_FINEWEB_REPO_ID", variant.repository)
    if repository is None:
        fix = f"make it: data/download.py caseops, then data/fuse.py --out .../{variant.dataset};"
        fix += " or set MATCHED_FINEWEB_REPO_ID"
        raise DataError(f"variant {short}", "no repository that publishes it", "one", fix)
    if not huggingface_hub.constants.is_offline_mode():
        return HubSource(repository, prefix)
    try:
        snapshot = Path(huggingface_hub.snapshot_download(repository, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError as error:
        found = f"nothing of {repository} in the hub's cache"
        raise DataError("HF_HUB_OFFLINE", found, "a cached copy", "unset HF_HUB_OFFLINE") from error
    return FolderSource(repository, snapshot.name, snapshot, prefix)


class HubSource:
    def __init__(self, repository: str, prefix: str):
        self.repository, self.prefix = repository, prefix
        self.endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or huggingface_hub.constants.ENDPOINT
        self.api = huggingface_hub.HfApi(endpoint=self.endpoint)

    def revision(self) -> str:
        return patiently(
            lambda: self._ask(lambda: self.api.dataset_info(self.repository).sha, "its revision"), self.repository
        )

    def list(self, revision: str, folder: str) -> list[RemoteFile]:
        path = "/".join(part for part in (self.prefix, folder) if part)
        listing = functools.partial(self.api.list_repo_tree, self.repository, path, revision=revision)
        tree = patiently(lambda: self._ask(lambda: list(listing(repo_type="dataset")), path), path)
        files = [entry for entry in tree if isinstance(entry, huggingface_hub.hf_api.RepoFile)]
        hashes = [(file.lfs.sha256, None) if file.lfs else (None, file.blob_id) for file in files]
        return [RemoteFile(file.path, file.size, *known) for file, known in zip(files, hashes, strict=True)]

    def identify(self, file: RemoteFile) -> RemoteFile:
        return file  # the listing has the hash

    def fetch(self, revision: str, file: RemoteFile, part: Path) -> None:
        """Append what is missing of `part`; the hub's client asks for the range and retries."""
        url = huggingface_hub.hf_hub_url(
            self.repository, file.path, repo_type="dataset", revision=revision, endpoint=self.endpoint
        )
        part.touch()
        if part.stat().st_size > file.size:
            part.write_bytes(b"")
        with part.open("r+b") as out:
            resume = out.seek(0, os.SEEK_END)
            try:
                self._ask(lambda: http_get(url, out, resume_size=resume, expected_size=file.size,
                                           headers=huggingface_hub.utils.build_hf_headers()), file.path)  # fmt: skip
            except OSError as error:
                # Without a status it is the client's "wrong number of bytes"; the check that follows says what came.
                if error.errno is not None or isinstance(error, HfHubHTTPError):
                    raise

    def _ask(self, question: Callable[[], Any], about: str) -> Any:
        """The hub's answer; a refusal that a retry cannot change becomes a DataError."""
        place = f"{self.repository}: {about}"
        try:
            return question()
        except GatedRepoError as error:
            raise DataError(
                place, "a repository that needs a token", "access", "set HF_TOKEN to a token that may read it"
            ) from error
        except RepositoryNotFoundError as error:
            raise DataError(
                place,
                f"no such repository on {self.endpoint}",
                "a public dataset",
                "check MATCHED_FINEWEB_REPO_ID; for a private one set HF_TOKEN",
            ) from error
        except EntryNotFoundError as error:
            raise DataError(
                place,
                "not in the repository",
                "this file or folder",
                "the repository lacks the variant: check MATCHED_FINEWEB_REPO_ID",
            ) from error
        except HfHubHTTPError as error:
            if error.response.status_code >= 500:
                raise
            status = error.response.status_code
            raise DataError(place, f"HTTP status {status}", "200", "try again later, or check HF_ENDPOINT") from error


class FolderSource:
    """A plain folder laid out like the hub's repository (datasets/datasets/NAME) or like ROOT (datasets/NAME)."""

    def __init__(self, repository: str, revision: str, folder: Path, prefix: str):
        if not folder.is_dir():
            raise DataError(folder, "no such folder", "one with datasets/ and tokenizers/", "check --from")
        self.repository, self._revision = repository, revision
        self.base = folder / prefix if (folder / prefix / "tokenizers").is_dir() else folder

    def revision(self) -> str:
        return self._revision

    def list(self, revision: str, folder: str) -> list[RemoteFile]:
        if not (self.base / folder).is_dir():
            raise DataError(self.base / folder, "no such folder", "files of the variant", "check --from")
        paths = sorted((self.base / folder).iterdir())
        return [RemoteFile(str(path), path.stat().st_size) for path in paths if path.is_file()]

    def identify(self, file: RemoteFile) -> RemoteFile:
        return replace(file, sha256=shards.file_sha256(Path(file.path)))

    def fetch(self, revision: str, file: RemoteFile, part: Path) -> None:
        shutil.copyfile(file.path, part)


if __name__ == "__main__":
    shards.run_command(main)
