"""The job's configuration: dataclasses, read strictly from YAML. They are the reference of what exists."""

from mindrlhf.config.jobs import *  # noqa: F403
from mindrlhf.config.reading import config_to_yaml, difference, load_config  # noqa: F401
from mindrlhf.config.sections import *  # noqa: F403
