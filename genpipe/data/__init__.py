"""Captioned pictures to train on: folders, webdataset shards and emoji scenes drawn on the fly."""
