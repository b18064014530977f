"""Published systems, measured again: one file per system, its claim and its setting beside our number.

A reproduction is a module here, or a package for one that is long, with a function `rows(settings) -> Iterator[Row]`; it is found
by walking this folder. Its docstring gives claim, mechanism, setting and sources. Its numbers come from our engines and our
timeline under the published setting; what is taken from a publication is an input, and its row says so.
"""
