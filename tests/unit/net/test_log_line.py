"""The ancestor's log lines: read as they stand in its README, refused with what is wrong."""

from __future__ import annotations

import pytest

from torpor.errors import InvalidInput
from torpor.net.addresses import addresses_of
from torpor.net.log_line import FIELDS, allocation_fields, allocation_line, parse_log_line, tap_line

FIELDS_OF_README = (
    "CloneIP=172.18.0.53 ContainerCIDR=172.16.0.2/24 ContainerIP=172.16.0.2 GatewayIP=172.16.0.1"
    " HostDevName=tap0 NamespaceName=uvmns52 NamespacePath=/var/run/netns/uvmns52"
    " Veth0CIDR=172.17.0.210/30 Veth0Name=veth52-0 Veth1CIDR=172.17.0.209/30 Veth1Name=veth52-1"
    " funcID=4"
)
README = (
    'time="2023-01-19T23:19:27.830614078-07:00" level=debug msg="Allocated a new network config" '
    + FIELDS_OF_README
)
TAP = (
    'time="2023-01-19T23:19:27.837626054-07:00" level=debug msg="Creating tap for virtual network"'
    " IP gateway=172.16.0.1/24 namespace=uvmns53 tap=tap0"
)


@pytest.mark.parametrize(
    "text",
    [
        README,
        FIELDS_OF_README,
        f"{README}\n{TAP}\n",
        f"{TAP}\r\n\n  {README}  ",
        f"node7: {README}",
    ],
    ids=["as it stands", "fields only", "both lines", "the other way round", "collected"],
)
def test_line_of_the_readme(text: str) -> None:
    """The line is read as it stands, alone or beside the one about the tap."""
    fields = parse_log_line(text)
    assert list(fields) == list(FIELDS)
    assert fields["CloneIP"] == "172.18.0.53"
    assert fields["NamespacePath"] == "/var/run/netns/uvmns52"
    assert fields["funcID"] == "4"


def test_own_lines_are_read() -> None:
    """What torpor logs comes back, an id with quotes and spaces too."""
    slot = addresses_of(7)
    for func_id in ("hello-1", 'a "b" c=d \\'):
        text = f"{tap_line(slot)}\n{allocation_line(slot, func_id)}"
        assert parse_log_line(text) == allocation_fields(slot, func_id)


@pytest.mark.parametrize("name", FIELDS)
def test_missing_field_is_named(name: str) -> None:
    """A line without a field, or with nothing as its value, is refused for that field."""
    words = README.split(" ")
    (place,) = [i for i, word in enumerate(words) if word.startswith(f"{name}=")]
    for text in (
        words[:place] + words[place + 1 :],
        [*words[:place], f"{name}=", *words[place + 1 :]],
    ):
        with pytest.raises(InvalidInput, match=f"the log line has no {name}$") as caught:
            parse_log_line(" ".join(text))
        assert name in caught.value.hint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there are 0 lines"),
        ("  \n", "there are 0 lines"),
        (TAP, "there are 0 lines"),
        (f"{README}\n{README}", "there are 2 lines"),
        ("nonsense", "malformed at 'nonsense'"),
        (f"{README} trailing", "malformed at 'trailing'"),
        (f"{README} Other=1", "unknown field 'Other'"),
        (f"{README} two words=1", "unknown field 'two words'"),
        (f"{README} funcID=5", "has funcID twice"),
        (README.replace("funcID=4", 'funcID="4'), "malformed at"),
        (README.replace("funcID=4", 'funcID=4"5'), "malformed at"),
        (README.replace("funcID=4", 'funcID="\\x"'), "malformed value"),
        (README.replace("CloneIP=", "CloneIP = "), "malformed at|unknown field|no CloneIP"),
        (README.replace("CloneIP=", "=CloneIP="), "malformed at"),
        (README.replace("Allocated", "Freed"), "not a line about an allocation: 'Freed"),
    ],
)
def test_what_is_no_such_line(text: str, words: str) -> None:
    """Malformed lines, unknown and repeated fields, other messages: each is told."""
    with pytest.raises(InvalidInput, match=words) as caught:
        parse_log_line(text)
    assert caught.value.hint or caught.value.reason
