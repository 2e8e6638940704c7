"""Nodes that share a store: uploads in the background, deletions, and who wins a name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from fixtures.commands import wait_until
from fixtures.daemons import daemon
from torpor.config import Settings
from torpor.errors import Conflict, Incompatible, NotFound
from torpor.node.node import Node
from torpor.node.parts import open_parts

if TYPE_CHECKING:
    from fixtures.daemons import DaemonProcess
    from fixtures.homes import Furnished, Home
    from fixtures.minio import MinioServer
    from torpor.node.remote import Remote
    from torpor.node.tables import RemoteRow

pytestmark = pytest.mark.slow


def in_store(home: Home) -> dict[str, str]:
    """Names in the store and their snapshots."""
    return {line["name"]: line["snapshot"] for line in home.run("store", "ls", "--json").json()}


def states(served: DaemonProcess) -> dict[str, str]:
    """What the daemon says of its functions and the store."""
    with served.client() as client:
        return {function.name: function.store for function in client.functions()}


def remote(home: Home) -> dict[str, str]:
    """The settings of a node that lives from its store."""
    return {"store": home.store, "snapshots": "remote", "upload_retry_s": "1"}


def test_functions_are_uploaded_in_the_background(a: Furnished) -> None:
    """What the node has and the store lacks goes there; snapshots by their own wish alone."""
    with daemon(a.home.path, **remote(a.home)) as served:
        wait_until(lambda: states(served) == {"f": "stored", "g": "stored"})
        assert in_store(a.home) == {"f": a.f.digest, "g": a.g.digest}
        with served.client() as client:
            done = {e.subject for e in client.recent_events() if e.kind == "upload.done"}
            assert done == {"f", "g"}
            assert client.status().pending == ()


def test_pending_uploads_survive_the_daemon(a: Furnished) -> None:
    """While the store refuses the node says that it is ahead; killed and started it goes on."""
    store = a.home.path.parent / "store"
    store.write_text("not a directory")
    with daemon(a.home.path, **remote(a.home)) as served:
        wait_until(lambda: all(s.startswith("pending: ") for s in states(served).values()))
        with served.client() as client:
            assert client.status().pending == ("f", "g")
        served.kill()
        store.unlink()
        served.start()
        wait_until(lambda: states(served) == {"f": "stored", "g": "stored"})
    assert in_store(a.home) == {"f": a.f.digest, "g": a.g.digest}


@pytest.mark.minio
def test_store_that_dies_and_comes_back(a: Furnished, mortal_minio: MinioServer) -> None:
    """With the server killed the node is ahead and serves on; when it answers again all arrives."""
    server = mortal_minio.settings
    keys = ("store", "s3_endpoint", "s3_access_key_id", "s3_secret_access_key")
    settings = {key: str(getattr(server, key)) for key in keys}
    settings |= {"snapshots": "remote", "upload_retry_s": "1", "store_retry_s": "1"}
    with daemon(a.home.path, **settings) as served, served.client() as client:
        wait_until(lambda: states(served) == {"f": "stored", "g": "stored"})
        mortal_minio.kill()
        client.remove_function("g")
        wait_until(lambda: any(e.kind == "upload.failed" for e in client.recent_events()))
        assert client.status().pending == ("g",)
        with pytest.raises(Incompatible):  # woken without asking; no host runs a made-up one
            client.restore("f")
        mortal_minio.start()
        mortal_minio.wait_ready()
        wait_until(lambda: client.status().pending == ())
        with pytest.raises(NotFound):
            client.restore("g")


def test_commands_beside_the_daemon_are_uploaded_too(a: Furnished) -> None:
    """A command without the daemon writes its wish down, and the daemon finds it."""
    settings = {**remote(a.home)}
    with daemon(a.home.path, **settings) as served:
        wait_until(lambda: states(served) == {"f": "stored", "g": "stored"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORPOR_SNAPSHOTS", "remote")
        assert a.home.run("rm", "g").code == 0
    assert in_store(a.home).keys() == {"f", "g"}
    served.start()
    try:
        wait_until(lambda: in_store(a.home).keys() == {"f"})
    finally:
        assert served.stop() == 0


def remote_of(home: Home) -> Remote:
    """What a node of that home knows of the store's refs."""
    settings = Settings(home=home.path, store=home.store, snapshots="remote")
    return Node(open_parts(settings)).remote


def pending(found: Remote, name: str) -> RemoteRow:
    """The wish of a name that is to be fulfilled."""
    row = found.rows.get(name)
    assert row is not None
    assert row.state == "pending"
    return row


@pytest.mark.parametrize("wished", [False, True], ids=["as drift", "as a wish"])
def test_deploy_while_the_last_revision_is_uploaded(a: Furnished, *, wished: bool) -> None:
    """A node does not lose a name to its own older revision that gets there meanwhile."""
    node = remote_of(a.home)
    if wished:
        node.find_drift()
    before = node.before("f")
    node.find_drift()
    node.upload(pending(node, "f"))
    assert in_store(a.home) == {"f": a.f.digest}
    node.want_deployed("f", a.g.digest, before)
    node.upload(pending(node, "f"))
    assert in_store(a.home) == {"f": a.g.digest}


def test_deploy_while_another_node_uploads(a: Furnished, b: Home) -> None:
    """What another node put there meanwhile is not replaced, also when this node woke it."""
    node = remote_of(a.home)
    before = node.before("f")
    assert a.home.run("snapshot", "push", "g", "--name", "f").code == 0
    node.took("f", a.g.digest)
    node.want_deployed("f", a.f.digest, before)
    with pytest.raises(Conflict, match="somebody else wrote f"):
        node.upload(pending(node, "f"))
    assert in_store(b) == {"f": a.g.digest}


def test_deleted_on_one_node_the_other_says_so(a: Furnished, b: Home) -> None:
    """B finds what A deployed; when A removes it B does not wake its own copy, and says why."""
    with daemon(a.home.path, **remote(a.home)) as first, daemon(b.path, **remote(b)) as second:
        wait_until(lambda: states(first) == {"f": "stored", "g": "stored"})
        with first.client() as on_a, second.client() as on_b:
            with pytest.raises(NotFound):
                on_b.restore("nothing")
            with pytest.raises(Incompatible):  # a made-up one that no host runs; it was fetched
                on_b.restore("f")
            assert [(one.name, one.store) for one in on_b.functions()] == [("f", "stored")]
            on_a.remove_function("f")
            wait_until(lambda: "f" not in in_store(a.home))
            with pytest.raises(NotFound, match="was deleted in the store"):
                on_b.restore("f")
            assert on_b.functions() == []


def test_two_nodes_that_deploy_one_name(a: Furnished, b: Home) -> None:
    """One wins, the other is told: in `ls`, in its events. Then it uses the winner's."""
    archive = a.home.path.parent / "g.tar"
    assert a.home.run("snapshot", "export", "g", archive).code == 0
    assert b.run("snapshot", "import", archive, "--name", "f").code == 0
    with daemon(a.home.path, **remote(a.home)) as first:
        wait_until(lambda: states(first)["f"] == "stored")
        with daemon(b.path, **remote(b)) as second:
            wait_until(lambda: states(second)["f"].startswith("lost: "))
            assert a.f.digest[:12] in states(second)["f"]
            assert in_store(a.home)["f"] == a.f.digest
            out = b.run_program("ls", "--json").stdout
            assert json.loads(out)[0]["store"] == ""  # a command's settings name no remote
            with second.client() as client:
                (lost,) = [e for e in client.recent_events() if e.kind == "upload.lost"]
                assert lost.subject == "f"
                with pytest.raises(Incompatible):
                    client.restore("f")
                assert [one.snapshot for one in client.functions()] == [a.f.digest]
            assert states(second)["f"] == "stored"
