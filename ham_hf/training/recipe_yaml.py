# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Reads the YAML of recipes: safely, without a key given twice, and with numbers as YAML 1.2 writes them."""

import re
from typing import Any

import yaml

from ..hub.sources import DEEPEST


class RecipeLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, and reads 1e-3 as a number, as YAML 1.2 does."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; raises `yaml.YAMLError` if it is nested more deeply than Python could follow."""
        self._depth += 1
        if self._depth > DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"it is nested more than {DEEPEST} deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A dictionary; raises `yaml.YAMLError` if a key comes twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"`{key}` is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
