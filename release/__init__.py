"""What a maintainer runs before a release: ``python -m release.check``; nothing of this is in the wheel."""
