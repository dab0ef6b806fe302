"""The patterns by which a JSON object is read without parsing its values.

The C code of ``bytes`` and ``re`` skips long strings and arrays of numbers. No pattern here repeats a group
possessively: Python before 3.11.5 gets that wrong (gh-106052). Patterns repeat single characters possessively, and each
group can match in one way only, so that no input causes long backtracking.
"""

from __future__ import annotations

import re
from typing import Final

LONGEST_NAME_BYTES: Final = 4096
"""Of a key or a model's name, with its escapes. Longer keys are ignored, longer names refused."""

BLANK: Final = rb"[ \t\r\n]*+"
# A quote after one backslash, or after three as in JSON within JSON, is escaped. Python code handles other numbers of
# backslashes, which are rare. Looking back at each quote is several times as fast as looking forward at each backslash.
_ESCAPED: Final = rb'(?:(?<=[^\\]\\")|(?<=[^\\]\\\\\\"))'
STRING: Final = rb'"[^"]*+"(?:' + _ESCAPED + rb'[^"]*+")*(?<!\\")'
# An array or object without strings, arrays and objects in it.
_FLAT: Final = rb'[\[{][^"\[\]{}]*+[\]}]'
# A string that needs no decoding and may be a name.
PLAIN: Final = rb'[^"\\\x00-\x1f]{0,%d}+' % LONGEST_NAME_BYTES
SCALAR: Final = rb"[-+.0-9A-Za-z]++"

blank = re.compile(BLANK).match
# Skips the byte order mark too, which some clients on Windows write.
opening = re.compile(rb"[\xef\xbb\xbf \t\r\n]*+").match
scalar = re.compile(SCALAR).match
# Up to a quote that may end the string, or to the end of the data.
to_quote = re.compile(rb'(?:[^"]*+"' + _ESCAPED + rb')*[^"]*+').match
# Up to a bracket, to a string that does not end here or has odd backslashes, or to the end of the data.
to_bracket = re.compile(rb'[^"\[\]{}]*+(?:(?:' + STRING + rb"|" + _FLAT + rb')[^"\[\]{}]*+)*').match

QUOTE, BACKSLASH, COMMA, COLON, OPEN, CLOSE = b'"\\,:{}'
BRACKETS: Final = b"{["
