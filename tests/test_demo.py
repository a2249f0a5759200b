"""``emag-export demo`` with the embedded model that the other tests do not demonstrate."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from emag_export.cli.demo import EMBEDDED
from emag_export.cli.main import main


def test_both_embedded_models_can_be_demonstrated() -> None:
    assert EMBEDDED == ("tiny-sd3", "tiny-dit")


@pytest.mark.rehearsal
def test_the_class_model_is_demonstrated(tmp_path: Path) -> None:
    with CliRunner().isolated_filesystem(tmp_path):
        done = CliRunner().invoke(main, ["demo", "--model", "tiny-dit"])
        assert done.exit_code == 0, done.output
        assert done.stdout.count("passed") == 2
        assert Image.open("out/demo-tiny-dit/pictures.png").width > 4 * 64
