"""What these tests share with those of the programs."""

from tests.cli.conftest import straight, workplace

__all__ = ["straight", "workplace"]
