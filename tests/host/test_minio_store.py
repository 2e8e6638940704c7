"""What `setup_minio.sh local` made: a store that works, a key that reaches its prefix only."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
import pytest
import yaml

from fixtures.setup_minio import MC, ROOT, SetupMinio, bucket_of, require_programs, values_in
from torpor.config import load_settings
from torpor.errors import ObjectConflict, ObjectMissing
from torpor.store.interface import Absent, Etag
from torpor.store.stack import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.minio, pytest.mark.host]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SetupMinio]:
    """A store that was set up once, for tests that leave it working."""
    require_programs()
    setup = SetupMinio(tmp_path_factory.mktemp("setup-minio"))
    setup.must()
    yield setup
    setup.must("--stop")
    assert setup.pid is None


@pytest.fixture
def key(store: SetupMinio) -> dict[str, str]:
    """The TORPOR_* variables that the store's node lines set."""
    return values_in((store.home / "keys" / "torpor" / "prod" / "torpor.env").read_text())


def files_below(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and content of what the script keeps: all files but the server's own data."""
    return {
        str(path.relative_to(directory)): (stat.S_IMODE(path.stat().st_mode), path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file() and path.relative_to(directory).parts[0] not in ("data", "mc")
    }


def test_printed_lines_open_a_working_store(store: SetupMinio) -> None:
    """What the script prints is all that torpor needs to put, replace, read, list and delete."""
    lines = store.must().stdout
    settings = load_settings(environ=values_in(lines))
    opened = open_store(settings)
    etag = opened.put("refs/one", b"first", condition=Absent())
    with pytest.raises(ObjectConflict):
        opened.put("refs/one", b"other", condition=Absent())
    opened.put("refs/one", b"second", condition=Etag(etag))
    with pytest.raises(ObjectConflict):
        opened.put("refs/one", b"third", condition=Etag(etag))
    assert opened.get("refs/one", limit_bytes=100)[0] == b"second"
    assert opened.get_range("refs/one", 2, 3) == b"con"
    opened.put_stream("packs/big", (bytes([number]) * 9_000_000 for number in range(3)))
    assert opened.head("packs/big").size_bytes == 27_000_000
    assert [info.key for info in opened.list("")] == ["packs/big", "refs/one"]
    for name in ("refs/one", "packs/big"):
        opened.delete(name)
    with pytest.raises(ObjectMissing):
        opened.head("refs/one")
    opened.put("refs/one", b"again", condition=Absent())  # a delete marker is no object
    opened.delete("refs/one")


def test_trial_of_the_docs_trusts_this_store(store: SetupMinio) -> None:
    """The trial that docs/stores.md shows says yes to MinIO, and to a directory."""
    trial = (ROOT / "docs" / "stores.md").read_text().split("```python\n")[1].split("```")[0]
    for environ in (values_in(store.must().stdout), {"TORPOR_STORE": f"file://{store.home}/files"}):
        result = subprocess.run(
            [sys.executable, "-c", trial],
            env={"PATH": os.environ["PATH"], **environ},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.stdout == "yes\n", result.stderr


def test_second_run_changes_nothing(store: SetupMinio) -> None:
    """A second run keeps process, secrets, files and server state, and says so."""
    before, pid = files_below(store.home), store.pid
    root = [store.mc("ilm", "rule", "export", "it/torpor"), store.mc("admin", "user", "list", "it")]
    first = store.must()
    second = store.must()
    assert "nothing changed" in second.stderr
    assert " changed:" not in second.stderr
    assert first.stdout == second.stdout
    assert files_below(store.home) == before
    assert store.pid == pid
    assert root == [
        store.mc("ilm", "rule", "export", "it/torpor"),
        store.mc("admin", "user", "list", "it"),
    ]


def test_secrets_are_for_their_owner_only(store: SetupMinio) -> None:
    """No file with a secret, and no directory of keys, can be read by others or seen in ps."""
    secrets = [
        value
        for file in (store.home / "root.env", store.home / "keys/torpor/prod/torpor.env")
        for name, value in values_in(file.read_text()).items()
        if "PASSWORD" in name or "SECRET" in name
    ]
    assert len(secrets) == 2
    assert all(len(secret) >= 32 for secret in secrets)
    for name, (mode, content) in files_below(store.home).items():
        if any(secret.encode() in content for secret in secrets):
            assert mode == 0o600, name
    assert stat.S_IMODE((store.home / "keys").stat().st_mode) == 0o700
    assert stat.S_IMODE((store.home / "data").stat().st_mode) == 0o700
    command_line = Path(f"/proc/{store.pid}/cmdline").read_bytes()
    assert not any(secret.encode() in command_line for secret in secrets)


@pytest.mark.parametrize("outside", ["prod-two/x", "prodx", "other/x", "x"])
def test_key_reaches_nothing_outside_its_prefix(
    store: SetupMinio, key: dict[str, str], outside: str
) -> None:
    """With the key, every request for an object beside the prefix is denied."""
    store.mc("pipe", f"it/torpor/{outside}", data="secret")
    bucket = bucket_of(key)
    denied = obstore.exceptions.PermissionDeniedError
    with pytest.raises(denied):
        obstore.get(bucket, outside)
    with pytest.raises(denied):
        obstore.put(bucket, outside, b"mine", use_multipart=False)
    with pytest.raises(denied):
        obstore.put(bucket, outside, b"x" * 12_000_000, chunk_size=6_000_000)
    # deletes travel in bulk: the refusal stands in the answer, so what counts is what is left
    with pytest.raises(obstore.exceptions.BaseError):
        obstore.delete(bucket, outside)
    assert store.mc("cat", f"it/torpor/{outside}") == "secret"
    store.mc("rm", f"it/torpor/{outside}")


def test_key_cannot_make_an_object_of_the_prefix_itself(
    store: SetupMinio, key: dict[str, str]
) -> None:
    """An object with the prefix's own name would hide in MinIO's lists all that is below it."""
    with pytest.raises(obstore.exceptions.PermissionDeniedError):
        obstore.put(bucket_of(key), "prod", b"x", use_multipart=False)
    assert store.ask_mc("stat", "it/torpor/prod").returncode != 0


def test_key_lists_its_prefix_only(store: SetupMinio, key: dict[str, str]) -> None:
    """The key lists below its prefix; buckets, the bucket and sibling prefixes are denied."""
    store.mc("pipe", "it/torpor/prod-two/x", data="x")
    store.mc("pipe", "it/torpor/prod/x", data="x")
    store.mc("mb", "it/elsewhere")
    assert store.mc("ls", "it/torpor/prod/", key=key).splitlines()[0].endswith(" x")
    for place in ("it", "it/torpor/", "it/torpor/prod", "it/torpor/prod-two/", "it/elsewhere/"):
        assert "Access Denied" in store.ask_mc("ls", place, key=key).stderr, place
    assert store.ask_mc("admin", "user", "list", "it", key=key).returncode != 0
    assert store.ask_mc("version", "suspend", "it/torpor", key=key).returncode != 0
    store.mc("rb", "--force", "it/elsewhere")
    store.mc("rm", "--recursive", "--force", "it/torpor/")


def test_key_cannot_remove_old_versions(store: SetupMinio, key: dict[str, str]) -> None:
    """What a node replaces or deletes, it cannot make unrecoverable."""
    target = "it/torpor/prod/precious"
    store.mc("pipe", target, key=key, data="old")
    store.mc("rm", target, key=key)
    listed = store.mc("--json", "ls", "--versions", target).splitlines()
    versions = [json.loads(line) for line in listed]
    assert [version.get("isDeleteMarker", False) for version in versions] == [True, False]
    for version in versions:
        refused = store.ask_mc("rm", "--version-id", version["versionId"], target, key=key)
        assert refused.returncode != 0
    assert store.mc("cat", "--version-id", versions[1]["versionId"], target) == "old"


def test_bucket_is_versioned_and_old_versions_expire(store: SetupMinio) -> None:
    """Versioning is on; replaced versions and lone delete markers have an expiry."""
    info = json.loads(store.mc("--json", "version", "info", "it/torpor"))
    assert info["versioning"]["status"] == "Enabled"
    (rule,) = json.loads(store.mc("ilm", "rule", "export", "it/torpor"))["Rules"]
    assert rule["Status"] == "Enabled"
    assert rule["NoncurrentVersionExpiration"] == {"NoncurrentDays": 7}
    assert rule["Expiration"] == {"ExpiredObjectDeleteMarker": True}
    assert not rule.get("Filter"), "the rule is for the whole bucket"


def test_minio_keeps_no_rule_for_unfinished_uploads(store: SetupMinio) -> None:
    """Why the server's own setting is used: MinIO takes such a rule and forgets that part."""
    rule = {
        "ID": "r",
        "Status": "Enabled",
        "Filter": {"Prefix": ""},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1},
        "NoncurrentVersionExpiration": {"NoncurrentDays": 3},
    }
    store.mc("mb", "it/scratch")
    store.mc("ilm", "rule", "import", "it/scratch", data=json.dumps({"Rules": [rule]}))
    (kept,) = json.loads(store.mc("ilm", "rule", "export", "it/scratch"))["Rules"]
    store.mc("rb", "--force", "it/scratch")
    assert kept["NoncurrentVersionExpiration"] == {"NoncurrentDays": 3}
    assert "AbortIncompleteMultipartUpload" not in kept


def test_second_prefix_gets_a_key_of_its_own(store: SetupMinio, key: dict[str, str]) -> None:
    """Another prefix on the same server has another key; neither reaches the other's objects."""
    lines = store.must("--prefix", "staging/a").stdout
    other = values_in(lines)
    assert other["TORPOR_STORE"] == "s3://torpor/staging/a"
    assert other["TORPOR_S3_ACCESS_KEY_ID"] != key["TORPOR_S3_ACCESS_KEY_ID"]
    store.mc("pipe", "it/torpor/staging/a/x", key=other, data="x")
    assert store.ask_mc("cat", "it/torpor/staging/a/x", key=key).returncode != 0
    store.mc("pipe", "it/torpor/prod/x", key=key, data="x")
    assert store.ask_mc("cat", "it/torpor/prod/x", key=other).returncode != 0
    store.mc("rm", "--recursive", "--force", "it/torpor/")


def test_key_that_was_tampered_with_is_repaired(store: SetupMinio, key: dict[str, str]) -> None:
    """A run brings back what somebody took from key, policy, versioning or lifecycle."""
    name = key["TORPOR_S3_ACCESS_KEY_ID"]
    store.mc("admin", "policy", "detach", "it", name, "--user", name)
    store.mc("admin", "policy", "remove", "it", name)
    store.mc("version", "suspend", "it/torpor")
    store.mc("ilm", "rule", "rm", "--all", "--force", "it/torpor")
    result = store.must()
    for what in ("versioning", "lifecycle", "policy", "key"):
        assert f" changed: {what}" in result.stderr
    open_store(load_settings(environ=key)).put("refs/again", b"x")
    assert "nothing changed" in store.must().stderr


def test_foreign_lifecycle_rules_are_not_overwritten(store: SetupMinio) -> None:
    """A bucket with rules of somebody else is refused, and keeps them."""
    store.mc("mb", "it/theirs")
    store.mc("ilm", "rule", "add", "it/theirs", "--expire-days", "30")
    before = store.mc("ilm", "rule", "export", "it/theirs")
    result = store.run("--bucket", "theirs")
    assert result.returncode == 1
    assert 'failed at "lifecycle": bucket theirs has a lifecycle rule of its own' in result.stderr
    assert store.mc("ilm", "rule", "export", "it/theirs") == before
    store.mc("rb", "--force", "it/theirs")


def test_bucket_job_of_the_manifests_sets_a_store_up(store: SetupMinio, tmp_path: Path) -> None:
    """The Kubernetes job's own script, variables and secrets, with a shell and mc and no other
    program, set a bucket up; the second run of the job changes nothing."""
    cluster = SetupMinio(tmp_path / "cluster", mode="kubernetes")
    lines = cluster.must(
        "--output", str(tmp_path / "manifests"), "--bucket", "job", "--prefix", "p"
    )
    stream = (tmp_path / "manifests" / "60-bucket-job.yaml").read_text()
    config, job = yaml.safe_load_all(stream)
    key = values_in(lines.stdout) | {"TORPOR_S3_ENDPOINT": f"http://127.0.0.1:{store.port}"}
    variables = {
        variable["name"]: variable.get("value") or key[variable["valueFrom"]["secretKeyRef"]["key"]]
        for variable in job["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "mc").symlink_to(MC)
    variables |= values_in((store.home / "root.env").read_text())
    variables |= {
        "ENDPOINT": key["TORPOR_S3_ENDPOINT"],
        "HOME": str(tmp_path),
        "MC_CONFIG_DIR": str(tmp_path / "mc"),
        "PATH": str(programs),
    }
    said = [
        subprocess.run(
            ["/bin/sh", "-c", config["data"]["bucket.sh"]],
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        for _ in range(2)
    ]
    assert [result.returncode for result in said] == [0, 0], said
    assert "changed: bucket job was made" in said[0].stdout
    assert all(line.startswith("unchanged: ") for line in said[1].stdout.splitlines())
    opened = open_store(load_settings(environ=key))
    opened.put("refs/one", b"1")
    assert opened.get("refs/one", limit_bytes=10)[0] == b"1"
    store.mc("rb", "--force", "it/job")


def test_dry_run_of_a_store_that_is_set_up(store: SetupMinio) -> None:
    """Where nothing is to do, --dry-run says that nothing would change."""
    assert "nothing changed" in store.must("--dry-run").stderr
