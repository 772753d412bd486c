"""Links to a state of the page: the state is in the fragment of its address, which browsers send to no server."""

from __future__ import annotations

from urllib.parse import parse_qs, urlencode

from cocomix.common.errors import InputError

FIELDS = 64
"""Maximum number of values in a link."""
# The browser's Back and Forward return to earlier states.
READ = "() => { addEventListener('popstate', () => location.reload()); return location.hash.slice(1); }"
"""Function of the browser that returns the fragment, once, when the page has loaded."""
WRITE = """(link) => {
  if (link && link !== location.hash.slice(1)) history.pushState(null, '', '#' + link);
  return location.href;
}"""
"""Function of the browser that puts a fragment into the address, and returns the address."""
PRESS = """() => {
  const tab = new URLSearchParams(location.hash.slice(1)).get('tab');
  document.getElementById(`${tab}-start`)?.click();
}"""
"""Function of the browser that presses the button of the tab that a link opened."""


def write_link(tab: str, **values: object) -> str:
    """Return the fragment of a state: a tab, and values by name; a list gives several values of one name."""
    return urlencode({"tab": tab, **values}, doseq=True)


class Link:
    """A parsed fragment.

    Args:
        fragment: result of `write_link`, or anything else that somebody wrote.

    Raises:
        InputError: it has too many fields.
    """

    def __init__(self, fragment: str) -> None:
        try:
            self.values = parse_qs(fragment, keep_blank_values=True, max_num_fields=FIELDS)
        except ValueError:
            raise InputError(f"the link has more than {FIELDS} fields") from None

    def text(self, name: str, default: str = "") -> str:
        """Return the first value of a name."""
        return self.values.get(name, [default])[0]

    def number(self, name: str) -> float | None:
        """Return the first value of a name as a number; None if it is not a finite one."""
        try:
            number = float(self.text(name))
        except ValueError:
            return None
        return number if abs(number) < 1e12 else None
