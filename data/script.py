"""What the other programs take from train_gpt.py, so that each fact stands there alone.

It is read from the text of the script: importing it would load PyTorch, which takes seconds.
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
    """Constants and functions by name. They may use each other, and of all modules `ast` and what they import."""
    chosen = [node for node in statements() if defined_names(node) & set(names)]
    scope: dict[str, Any] = {"ast": ast}
    exec(compile(ast.Module(chosen, []), SCRIPT.name, "exec"), scope)
    return {name: scope[name] for name in names}


def settings_of(*stages: str) -> set[str]:
    """The settings that decide nothing but these members of Stage: fields `name: type = setting(STAGE, ...)`."""
    (config,) = [node for node in statements() if isinstance(node, ast.ClassDef) and node.name == "Config"]
    fields = [node for node in config.body if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call)]
    decided = {
        ast.unparse(node.target): {name.id for name in ast.walk(node.value.args[0]) if isinstance(name, ast.Name)}
        for node in fields
    }
    return {name for name, found in decided.items() if found <= set(stages)}
