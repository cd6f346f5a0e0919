"""What these tests share with those of the programs."""

from tests.cli.conftest import called, straight, workplace

__all__ = ["called", "straight", "workplace"]
