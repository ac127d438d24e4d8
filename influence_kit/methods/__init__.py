"""The methods: one file per method, in a folder per family, with its formula and its terms."""
