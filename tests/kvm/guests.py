"""What level 1's guests are made of, made out here: building an image under emulation is slow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fixtures.nodes import DEPLOYED, EXAMPLES, SESSION_HOME
from torpor.image.library import ImageLibrary
from torpor.image.spec import load_spec

if TYPE_CHECKING:
    from pathlib import Path


def make_images() -> Path:
    """The directory of the session home's images, with those of the examples that are deployed."""
    directory = SESSION_HOME / "images"
    library = ImageLibrary(directory)
    for name in DEPLOYED:
        library.build(load_spec(EXAMPLES / name).image, progress=lambda text: None)
    return directory
