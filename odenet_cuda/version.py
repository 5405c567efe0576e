"""The version, which the build takes from here: a copied checkout that was built in place has no metadata."""

VERSION = "0.1.0"
