"""Print the runtime environment of a Ray job: the packages that pyproject.toml asks for, as JSON.

ray job submit --working-dir . --runtime-env-json "$(python infra/runtime_env.py)" -- python pipelines/full.py …

Ray installs on each machine, once for the same list, what its own Python lacks. The source goes with --working-dir.
"""

import json
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
print(json.dumps({"pip": project["dependencies"] + project["optional-dependencies"]["pipelines"]}))
