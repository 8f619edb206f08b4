"""From pip's report to requirements with hashes: every package that the tests ran with, and the archive that it came from.

pip install --dry-run --ignore-installed --no-deps --report report.json -r constraints.txt
python .ci/hashed_requirements.py report.json > requirements-hashed.txt
"""

import json
import sys
from pathlib import Path

HEAD = """\
# The archives that the tests ran with, on Linux x86_64 with CPython 3.11. Written by .ci/hashed_requirements.py, which says how.
#   pip install --require-hashes -r requirements-hashed.txt && pip install --no-deps --no-build-isolation -e .
"""


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text())
    print(HEAD, end="")
    for item in sorted(report["install"], key=lambda item: item["metadata"]["name"].lower()):
        name, version = item["metadata"]["name"].lower().replace("_", "-"), item["metadata"]["version"]
        print(f"{name}=={version} --hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}")


if __name__ == "__main__":
    main()
