"""Constants, functions and settings of train_gpt.py for the other programs, so that none is written down twice.

They are read from the text of the script, because importing it loads PyTorch, which takes seconds.
"""

import ast
import functools
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt.py"


@functools.cache
def statements() -> list[ast.stmt]:
    """The statements of the script."""
    return ast.parse(SCRIPT.read_text()).body


def defined_names(node: ast.stmt) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node]
    return {getattr(target, "id", getattr(target, "name", "")) for target in targets}


def definitions(*names: str) -> dict[str, Any]:
    """Constants and functions by name. They may use each other, the modules `ast` and `functools`, and what they import
    themselves."""
    chosen = [node for node in statements() if defined_names(node) & set(names)]
    scope: dict[str, Any] = {"ast": ast, "functools": functools}
    exec(compile(ast.Module(chosen, []), SCRIPT.name, "exec"), scope)
    return {name: scope[name] for name in names}


def settings_of(*stages: str) -> set[str]:
    """The settings that decide only these members of Stage: fields `name: type = setting(STAGE, ...)` of Config."""
    (config,) = [node for node in statements() if isinstance(node, ast.ClassDef) and node.name == "Config"]
    fields = [node for node in config.body if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call)]
    decided = {
        ast.unparse(node.target): {name.id for name in ast.walk(node.value.args[0]) if isinstance(name, ast.Name)}
        for node in fields
    }
    return {name for name, found in decided.items() if found <= set(stages)}
