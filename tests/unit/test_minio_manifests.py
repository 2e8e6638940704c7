"""`setup_minio.sh kubernetes`: what it writes, and that check_manifests.py sees what is wrong."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from fixtures.setup_minio import ROOT, SetupMinio, values_in

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

CHECK = ROOT / "scripts" / "check_manifests.py"
VARIANTS = {
    "defaults": [],
    "everything": [
        *("--replicas", "4", "--storage", "500Gi", "--storage-class", "fast", "--memory", "4Gi"),
        *("--service", "LoadBalancer", "--allow", "10.0.0.0/8,fd00::/8", "--bucket", "123"),
        *("--namespace", "007", "--prefix", "a/b", "--region", "1", "--noncurrent-days", "30"),
    ],
}


@pytest.fixture
def setup(tmp_path: Path) -> SetupMinio:
    """A fresh home for manifests."""
    return SetupMinio(tmp_path / "home", mode="kubernetes")


def written(setup: SetupMinio, *flags: str) -> Path:
    """The directory of manifests that a call wrote."""
    directory = setup.home.parent / "manifests"
    setup.must("--output", str(directory), *flags)
    return directory


def documents(directory: Path) -> dict[tuple[str, str], Any]:
    """All documents of a directory by kind and name."""
    found = {}
    for file in sorted(directory.glob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            found[document["kind"], document["metadata"]["name"]] = document
    return found


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    """check_manifests.py's result."""
    return subprocess.run(
        [sys.executable, str(CHECK), *arguments], capture_output=True, text=True, check=False
    )


def decoded(secret: dict[str, Any]) -> dict[str, str]:
    """A Secret's values."""
    return {name: base64.b64decode(value).decode() for name, value in secret["data"].items()}


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_manifests_are_valid_in_many_kubernetes_versions(
    setup: SetupMinio, flags: list[str]
) -> None:
    """Strictly valid in each Kubernetes version from 1.25 to 1.37."""
    result = check(str(written(setup, *flags)))
    assert result.returncode == 0, result.stderr
    versions = result.stdout.split("valid in Kubernetes ")[1].replace(",", "")
    assert set(versions.split()) >= {f"1.{minor}" for minor in range(25, 38)}


BREAKAGES = {
    "unknown field": ("50-statefulset.yaml", "replicas: 1", "replicaz: 1"),
    "unknown field far below": ("50-statefulset.yaml", "mountPath: /tmp", "mountpath: /tmp"),
    "wrong type": ("50-statefulset.yaml", "replicas: 1", 'replicas: "one"'),
    "number for a variable": ("60-bucket-job.yaml", 'value: "7"', "value: 7"),
    "required field left out": ("50-statefulset.yaml", "  serviceName: torpor-minio-peers\n", ""),
    "unknown kind": ("40-services.yaml", "kind: Service", "kind: Servise"),
    "version that went away": ("60-bucket-job.yaml", "batch/v1", "batch/v1beta1"),
    "key that stands twice": ("40-services.yaml", "  type: ClusterIP", "  type: A\n  type: B"),
    "no kind": ("10-namespace.yaml", "kind: Namespace", "kid: Namespace"),
    "not YAML": ("10-namespace.yaml", "metadata:", "metadata: ["),
}


@pytest.mark.parametrize(("file", "right", "wrong"), BREAKAGES.values(), ids=BREAKAGES)
def test_broken_manifest_is_refused(setup: SetupMinio, file: str, right: str, wrong: str) -> None:
    """One mistake in one file: exit code 1, and the file is named, no other."""
    directory = written(setup)
    text = (directory / file).read_text()
    assert right in text
    (directory / file).write_text(text.replace(right, wrong, 1))
    result = check(str(directory), "--kubernetes", "1.31")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()
    assert all(line.startswith(f"{directory / file}: ") for line in result.stderr.splitlines())


def test_empty_manifests_are_refused(tmp_path: Path) -> None:
    """Neither an empty file nor a directory without manifests passes as valid."""
    assert check(str(tmp_path)).returncode == 2
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert check(str(tmp_path)).returncode == 1
    assert check(str(tmp_path / "missing.yaml")).returncode == 1
    assert check("--kubernetes", "0.9", str(tmp_path)).returncode == 2


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_names_fit_together(setup: SetupMinio, flags: list[str]) -> None:
    """What refers to another object or to pods finds them, in one namespace."""
    found = documents(written(setup, *flags))
    kinds = {kind for kind, _ in found}
    assert kinds == {
        *("Namespace", "Secret", "StatefulSet", "Service", "Job", "ConfigMap", "NetworkPolicy")
    }
    (namespace,) = (name for kind, name in found if kind == "Namespace")
    assert {
        d["metadata"]["namespace"] for (kind, _), d in found.items() if kind != "Namespace"
    } == {namespace}
    stateful = found["StatefulSet", "torpor-minio"]["spec"]
    labels = stateful["template"]["metadata"]["labels"]
    assert stateful["selector"]["matchLabels"].items() <= labels.items()
    assert ("Service", stateful["serviceName"]) in found
    for name in ("torpor-minio", "torpor-minio-peers"):
        service = found["Service", name]["spec"]
        assert service["selector"].items() <= labels.items()
        ports = stateful["template"]["spec"]["containers"][0]["ports"]
        assert {port["targetPort"] for port in service["ports"]} <= {port["name"] for port in ports}
    (job,) = (document["spec"] for (kind, _), document in found.items() if kind == "Job")
    for template in (job["template"], stateful["template"]):
        (container,) = template["spec"]["containers"]
        for source in container["envFrom"]:
            assert ("Secret", source["secretRef"]["name"]) in found
        for variable in container["env"]:
            reference = variable.get("valueFrom", {}).get("secretKeyRef")
            assert (
                reference is None or reference["key"] in found["Secret", reference["name"]]["data"]
            )
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        volumes |= {claim["metadata"]["name"] for claim in stateful["volumeClaimTemplates"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    assert job["template"]["spec"]["volumes"][0]["configMap"]["name"] == "torpor-minio-bucket"


def test_flags_reach_the_manifests(setup: SetupMinio) -> None:
    """Each flag is where it belongs, as text where text is needed."""
    found = documents(written(setup, *VARIANTS["everything"]))
    stateful = found["StatefulSet", "torpor-minio"]["spec"]
    (container,) = stateful["template"]["spec"]["containers"]
    assert stateful["replicas"] == 4
    assert container["command"][-1] == (
        "http://torpor-minio-{0...3}.torpor-minio-peers.007.svc.cluster.local:9000/data/minio"
    )
    assert container["resources"]["limits"] == {"memory": "4Gi"}
    claim = stateful["volumeClaimTemplates"][0]["spec"]
    assert (claim["storageClassName"], claim["resources"]["requests"]["storage"]) == (
        "fast",
        "500Gi",
    )
    service = found["Service", "torpor-minio"]["spec"]
    assert (service["type"], service["externalTrafficPolicy"]) == ("LoadBalancer", "Local")
    rules = found["NetworkPolicy", "torpor-minio"]["spec"]["ingress"]
    assert [peer["ipBlock"]["cidr"] for peer in rules[0]["from"] if "ipBlock" in peer] == [
        "10.0.0.0/8",
        "fd00::/8",
    ]
    (job,) = (document["spec"] for (kind, _), document in found.items() if kind == "Job")
    variables = {
        variable["name"]: variable.get("value")
        for variable in job["template"]["spec"]["containers"][0]["env"]
    }
    assert variables["BUCKET"] == "123"
    assert variables["PREFIX"] == "a/b"
    assert variables["NONCURRENT_DAYS"] == "30"


def test_secrets_are_those_of_the_printed_lines(setup: SetupMinio) -> None:
    """The node secret holds what the printed lines export; the root password is not among it."""
    directory = setup.home.parent / "manifests"
    lines = values_in(setup.must("--output", str(directory)).stdout)
    found = documents(directory)
    assert decoded(found["Secret", "torpor-minio-node"]) == lines
    root = decoded(found["Secret", "torpor-minio-root"])
    assert len(root["MINIO_ROOT_PASSWORD"]) == 40
    assert root["MINIO_ROOT_PASSWORD"] not in lines.values()
    assert lines["TORPOR_S3_ENDPOINT"] == "http://torpor-minio.torpor-store.svc.cluster.local:9000"
    for file in directory.iterdir():
        assert file.stat().st_mode & 0o077 == 0, file


def test_second_run_changes_nothing(setup: SetupMinio) -> None:
    """The same call writes the same manifests with the same secrets, and says so."""
    directory = written(setup)
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    result = setup.must("--output", str(directory))
    assert "nothing changed" in result.stderr
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


def test_printed_manifests_are_the_written_ones(setup: SetupMinio) -> None:
    """--output - prints one YAML stream of the same documents, the node's lines as comments."""
    expected = documents(written(setup))
    text = setup.must("--output", "-").stdout
    printed = [document for document in yaml.safe_load_all(text) if document]
    assert printed == list(expected.values())
    assert "# export TORPOR_STORE='s3://torpor/prod'" in text


def test_changed_settings_make_another_job(setup: SetupMinio) -> None:
    """A job cannot be changed in a cluster: other values have another name, the same the same."""

    def job_name(*flags: str) -> str:
        found = documents(written(setup, *flags))
        return next(name for kind, name in found if kind == "Job")

    first = job_name()
    assert job_name("--noncurrent-days", "8") != first
    assert job_name("--storage", "1Ti") == first


def test_dry_run_writes_nothing(setup: SetupMinio) -> None:
    """--dry-run names what it would write and run."""
    result = setup.must("--dry-run", "--apply", "--kubectl", "true")
    assert "would: write" in result.stderr
    assert "would: run kubectl apply -f" in result.stderr
    assert result.stdout == ""
    assert not setup.home.exists()


KUBECTL = """#!/bin/bash
# Records what it is asked, answers like kubectl, fails where KUBECTL_FAILS says.
echo "$*" >>"$HOME/kubectl.log"
[[ -z ${KUBECTL_FAILS-} || "$*" != *"$KUBECTL_FAILS"* ]] || { echo "no: $*" >&2; exit 1; }
[[ "$*" != *" apply "* ]] || echo "namespace/torpor-store ${KUBECTL_SAYS-created}"
"""


@pytest.fixture
def kubectl(setup: SetupMinio) -> list[str]:
    """Flags that apply with a kubectl that only records."""
    setup.home.mkdir()
    program = setup.home.parent / "kubectl"
    program.write_text(KUBECTL)
    program.chmod(0o755)
    return ["--apply", "--kubectl", str(program), "--context", "lab"]


def test_apply_waits_for_servers_and_job(setup: SetupMinio, kubectl: list[str]) -> None:
    """--apply hands all files over in one call, waits for the servers, then for the job."""
    setup.must(*kubectl)
    asked = (setup.home / "kubectl.log").read_text().splitlines()
    assert [line.split()[2:5] for line in asked] == [
        ["apply", "-f", f"{setup.home}/kubernetes/torpor-store/manifests/10-namespace.yaml"],
        ["-n", "torpor-store", "rollout"],
        ["-n", "torpor-store", "wait"],
    ]
    assert asked[0].count(" -f ") == 6
    assert all(line.startswith("--context lab ") for line in asked)
    setup.environ["KUBECTL_SAYS"] = "unchanged"
    assert "nothing changed" in setup.must(*kubectl).stderr


@pytest.mark.parametrize(
    ("fails", "step"), [("apply -f", "apply"), ("rollout", "health"), ("wait", "bucket")]
)
def test_apply_names_the_step_that_failed(
    setup: SetupMinio, kubectl: list[str], fails: str, step: str
) -> None:
    """What kubectl refuses is shown with the step; no lines for a node are printed."""
    setup.environ["KUBECTL_FAILS"] = fails
    result = setup.run(*kubectl)
    assert result.returncode == 1
    assert f'failed at "{step}": ' in result.stderr
    assert "no: " in result.stderr
    assert result.stdout == ""


WRONG_CALLS = {
    "no mode": ([], "say local or kubernetes"),
    "unknown mode": (["docker"], "no mode is called docker"),
    "unknown flag": (["local", "--bukket", "x"], "there is no flag --bukket"),
    "flag without a value": (["local", "--bucket"], "--bucket needs a value"),
    "word": (["local", "bucket"], "what is bucket?"),
    "other mode's flag": (["local", "--replicas", "4"], "--replicas is for kubernetes"),
    "other mode's switch": (["kubernetes", "--stop"], "--stop is for local"),
    "bucket": (["local", "--bucket", "A b"], "--bucket 'A b' is not a bucket's name"),
    "prefix leaves the bucket": (["local", "--prefix", "../x"], "--prefix '../x' is not a prefix"),
    "prefix of nothing": (["local", "--prefix", ""], "--prefix '' is not a prefix"),
    "quote": (["local", "--home", "/tmp/a'b"], "is not an absolute path"),
    "line break": (["local", "--region", "a\nb"], "is not a region"),
    "address": (["local", "--address", "9000"], "--address '9000' is not HOST:PORT"),
    "days": (["local", "--noncurrent-days", "0"], "is not a number of days"),
    "replicas": (["kubernetes", "--replicas", "2"], "--replicas '2' is not 1 or 4 to 16"),
    "cidr": (["kubernetes", "--allow", "all"], "--allow 'all' is not a list of CIDRs"),
}


@pytest.mark.parametrize(("arguments", "words"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_call_is_explained(tmp_path: Path, arguments: list[str], words: str) -> None:
    """A wrong flag or value: exit code 2, what is wrong, where help is; nothing is made."""
    script = str(ROOT / "scripts" / "setup_minio.sh")
    home = tmp_path / "home"
    result = subprocess.run(
        [script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "TORPOR_MINIO_HOME": str(home)},
    )
    assert result.returncode == 2
    assert words in result.stderr
    assert "--help" in result.stderr
    assert not home.exists()


def test_help_lists_every_flag_with_default_and_environment(tmp_path: Path) -> None:
    """Each row of the flag table is in --help, in three parts; the environment sets a default."""
    script = str(ROOT / "scripts" / "setup_minio.sh")
    environ = {"PATH": os.environ["PATH"]}
    text = subprocess.run(
        [script, "--help"], env=environ, capture_output=True, text=True, check=True
    ).stdout
    rows = (ROOT / "scripts" / "minio" / "flags.sh").read_text().split("flags=(")[1]
    names = [line.split('"')[1].split("|") for line in rows.split("\n)")[0].splitlines()[1:]]
    assert len(names) > 20
    for flag, _, variable, *_ in names:
        assert f"  --{flag} " in text
        assert f"environment {variable}\n" in text
    assert "Examples:" in text
    setup = SetupMinio(tmp_path / "home", mode="kubernetes")
    setup.environ["TORPOR_MINIO_BUCKET"] = "from-environment"
    assert "s3://from-environment/prod" in setup.must().stdout
    assert "s3://from-flag/prod" in setup.must("--bucket=from-flag").stdout
