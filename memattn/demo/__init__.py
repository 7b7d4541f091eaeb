"""The main job: every preset trained at equal tokens on real text, audited and compared."""

from memattn.demo.config import DemoConfig
from memattn.demo.run import run_demo

__all__ = ["DemoConfig", "run_demo"]
