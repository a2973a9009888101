"""The sub-commands of `mtsql`, one module each. `mtsql --help` lists them (`mtsql/__main__.py`).

A module has a docstring, which is the description in `mtsql NAME --help`, and a function
`main(words)`, which takes the words after the name. It may raise ValueError for the user's
mistakes; the caller prints them as one line.
"""
