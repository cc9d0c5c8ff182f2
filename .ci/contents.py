"""Look into a wheel: the kernels, the pages, the marks of types and the licence must be in it, tests must not."""

import sys
import zipfile
from pathlib import Path

DATA = {".cu", ".html", ".js", ".css", ".typed"}

with zipfile.ZipFile(sys.argv[1]) as wheel:
    inside = set(wheel.namelist())
packages = ("tinytensor", "minigpt")
wanted = {str(p) for package in packages for p in Path(package).rglob("*") if p.suffix in {".py", *DATA}}
if missing := wanted - inside:
    sys.exit(f"the wheel lacks {', '.join(sorted(missing))}; name its kind under [options.package_data] in setup.cfg")
others = inside - wanted
if not any(name.endswith("/LICENSE") for name in others):
    sys.exit("the wheel lacks LICENSE; name it under [metadata] in setup.cfg")
if strangers := {name for name in others if ".dist-info/" not in name}:
    sys.exit(f"the wheel also holds {', '.join(sorted(strangers))}; see [options.packages.find] in setup.cfg")
print(f"{sys.argv[1]}: {len(inside)} files")
