"""How the documentation site is made, beyond ``mkdocs.yml``."""
