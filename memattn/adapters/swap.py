"""Give a module of another library methods of ours, and take them away, by changing its class.

Its ``__class__`` is replaced by a subclass of the same name. The module stays the same object with
the same children and the same names in ``state_dict``; code that checks types or names of classes
still works, ``torch.compile`` notices the change, and restoring the class undoes it.
"""

import functools
from typing import Any

READ_OFF = ("forward", "prepare_inputs_for_generation")  # others read their arguments off them

_made: dict[tuple[type, type], type] = {}


def attached_class(mixin: type, base: type) -> type:
    """The subclass of ``base`` with the methods of ``mixin`` before its own."""
    if (mixin, base) not in _made:
        members: dict[str, Any] = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_memattn_made_of": (mixin, base),
        }
        for name in READ_OFF:
            if name in vars(mixin) and hasattr(base, name):
                members[name] = _with_signature(vars(mixin)[name], getattr(base, name))
        _made[mixin, base] = type(base.__name__, (mixin, base), members)
    return _made[mixin, base]


_Any: Any = object  # so that a checker knows: what a mixin calls is in the other base


def _with_signature(method: Any, like: Any) -> Any:
    """A function that calls a method of a mixin and has the signature of the overridden method."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    # what torch.compile keeps for one class must not count against another
    call.__code__ = call.__code__.replace(co_name=like.__qualname__.replace(".", "_"))
    return functools.wraps(like)(call)


class Swapped(_Any):
    """Base of the mixins: makes objects of generated classes copyable and picklable."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind: Any = type(self)
        if "_memattn_made_of" not in vars(kind):  # a further class, made by others
            return super().__reduce_ex__(protocol)
        return _new, kind._memattn_made_of, self.__dict__


def _new(mixin: type, base: type) -> Any:
    made: Any = attached_class(mixin, base)
    return made.__new__(made)


def swap(target: Any, mixin: type) -> None:
    """Give an object the methods of a mixin, unless it has them."""
    if not isinstance(target, mixin):
        target.__class__ = attached_class(mixin, type(target))


def is_swapped(target: Any) -> bool:
    """Whether the class of an object was generated here, and not subclassed by others."""
    return "_memattn_made_of" in vars(type(target))


def swap_back(target: Any) -> None:
    """Give an object its own class again."""
    target.__class__ = vars(type(target))["_memattn_made_of"][1]
