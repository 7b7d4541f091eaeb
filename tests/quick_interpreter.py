"""Triton's interpreter without work whose result it throws away: the same numbers in a third of
the time.
"""

import functools
import inspect


def make_quick() -> None:
    """Change the interpreter of this process, if it is built like that of Triton 3.6.

    It patches ``triton.language`` again at each call of a device function, although the kernel's
    own call has done so; and without ``debug`` it computes in int64 whether a sum of integers
    overflows, and drops what it finds.
    """
    try:
        from triton.runtime import interpreter

        patch, scope_type = interpreter._patch_lang, interpreter._LangPatchScope
        options = interpreter.interpreter_builder.options
        restore, np_dtype = scope_type.restore, interpreter._get_np_dtype
    except (ImportError, AttributeError):
        return
    if not options.debug:
        object.__setattr__(options, "sanitize_overflow", False)
    patched: set[int] = set()

    def patch_once(fn):
        modules = {id(value) for value in fn.__globals__.values() if inspect.ismodule(value)}
        modules &= {id(interpreter.tl), id(interpreter.tl.core)}
        if modules <= patched:
            return scope_type()
        patched.update(modules)
        return patch(fn)

    def restore_all(scope):
        if scope._changes:
            patched.clear()
        restore(scope)

    interpreter._patch_lang = patch_once
    scope_type.restore = restore_all
    scalar = functools.cache(np_dtype)  # it builds a table at each call

    def quick_dtype(dtype):
        if isinstance(dtype, interpreter.tl.pointer_type):
            return np_dtype(dtype)
        element = dtype.element_ty if isinstance(dtype, interpreter.tl.block_type) else dtype
        return (np_dtype if isinstance(element, interpreter.tl.pointer_type) else scalar)(element)

    interpreter._get_np_dtype = quick_dtype
