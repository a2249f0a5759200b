"""A mutation check of the core: change it in small ways, and see whether the tests notice.

mutmut 3.8 makes mutants of undecorated functions only. Here many are properties, or cached, and tables and
defaults are as much of the algorithm as functions. It also copies the package with ``os.walk``, which leaves
out the folders that are links.
"""
