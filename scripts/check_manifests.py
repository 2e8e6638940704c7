"""Checks Kubernetes manifests against the OpenAPI schemas of several Kubernetes versions, offline.

The schemas come with the package kubernetes-validate. Checked strictly: a field that a version does
not know is an error, as are a key that stands twice and a file with no document.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from kubernetes_validate.utils import all_versions, major_minor


class StrictLoader(yaml.SafeLoader):
    """YAML in which no key stands twice in one mapping; PyYAML would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As SafeLoader. Raises ConstructorError for a key that stands twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep=deep)


def known_versions() -> list[str]:
    """Kubernetes versions that there are schemas for, oldest first, such as 1.29."""
    found = dict.fromkeys(major_minor(version) for version in all_versions())
    return list(found)


def check_file(path: Path, versions: list[str]) -> list[str]:
    """What is wrong with a file, one line each; empty if every version takes all of it."""
    try:
        with path.open() as file:
            documents = list(yaml.load_all(file, Loader=StrictLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return [f"{path}: {' '.join(str(error).split())}"]
    if not documents:
        return [f"{path}: there is no document in it"]
    return [
        f"{path}: {problem}"
        for number, document in enumerate(documents, start=1)
        for problem in _check_document(document, number, versions)
    ]


def _check_document(document: object, number: int, versions: list[str]) -> list[str]:
    if not isinstance(document, dict) or not {"apiVersion", "kind"} <= document.keys():
        return [f"document {number} has no apiVersion and kind"]
    problems = []
    for version in versions:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            where = "/".join(str(step) for step in error.path) or "its top level"
            problems.append(
                f"{document['kind']} (document {number}), Kubernetes {version}, "
                f"at {where}: {error.message[:300]}"
            )
        except kubernetes_validate.SchemaNotFoundError as error:
            problems.append(f"document {number}, Kubernetes {version}: {error.message}")
    return problems


def main(arguments: list[str]) -> int:
    """Check what the command line names; the exit code: 0 all right, 1 not, 2 wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("paths", nargs="+", type=Path, help="YAML files, or directories of them")
    parser.add_argument(
        "--kubernetes",
        action="append",
        metavar="VERSION",
        choices=known_versions(),
        help="version to check against, may be repeated; default: all that the package has",
    )
    options = parser.parse_args(arguments)
    versions = options.kubernetes or known_versions()
    files: list[Path] = []
    for path in options.paths:
        found = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not found:
            parser.error(f"there is no .yaml file in {path}")
        files += found
    problems = [problem for path in files for problem in check_file(path, versions)]
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{len(files)} files are valid in Kubernetes {', '.join(versions)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
