"""Every file of rules is registered."""

import sys
from pathlib import Path

from sacl_fast.slim import rules


def test_every_file_of_rules_is_imported_with_the_package():
    files = {file.stem for file in Path(rules.__file__).parent.glob("*.py")} - {"__init__"}
    missing = {name for name in files if f"{rules.__name__}.{name}" not in sys.modules}
    assert not missing, f"import these in slim/rules/__init__.py: {missing}"
