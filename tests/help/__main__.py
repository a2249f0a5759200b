"""Write every ``--help`` as it is now: ``python -m tests.help``. Then read the difference."""

from tests.help import FOLDER, commands, shown

for name in commands():
    (FOLDER / f"{name}.txt").write_text(shown(name), "utf-8")
