"""Answers made from a gold: other spellings (equivalents), and what is not it (near misses)."""
import math
import random
import re
from fractions import Fraction

# Golds in the manner of MATH, for a clone without ../shared.
GOLDS = r"""
    0 | 7 | 42 | 540 | -3 | 2019 | 58,500 | 10,\!080 | 3.21 | .0000672 | \$18.90 | \$36
    5.4 \text{ cents} | 2k | 3R^2 | p - q | 2k+2 | 1-12i | 6 - 5i | 18+2\pi | 8 \pi | \pi
    \cot x | x=5 | y = 2x + 3 | (a+5)(b+2) | 6r^2-4r-24 | x^3+3x-6 | 3+2t | \pi r^2 h
    8n^2 + 4n + 1 | \frac{11+9a}{20} | \frac43 | \frac 59 | \frac9{19} | \frac{14}{3}
    -\frac{3}{8} | \dfrac{17}{50} | -\frac{\pi}{6} | 1\frac{4}{5} | 137 \frac{1}{2} | 11\sqrt2
    \sqrt{66} | 1+2\sqrt{3} | \frac{\sqrt{3}}{3} | 70 \sqrt{2} | 30^\circ
    \frac{270}7\text{ degrees} | 15\mbox{ cm}^2 | 864 \mbox{ inches}^2 | 204_5 | 4210_{5} | 40_9
    1,-2 | 3, 5, 7 | 1 \pm \sqrt{19} | \{1\pm\sqrt{5},-2\} | (2,4) | (1,-16,-4,43)
    \left( \frac{3}{2}, -13 \right) | (3,4] | (-\infty, 0] | (5,\infty)
    \left(\frac{3}{5},\frac{8}{3}\right] | x \in [-2,7] | (0,9) \cup (9,36)
    (-\infty, 2) \cup (3, \infty) | 5x - 7y + 11z + 4 = 0 | \text{even} | \text{Evelyn}
    \text{ellipse} | \text{(C)} | \begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}
    \begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix} | \begin{pmatrix} -7 \\ 16 \\ 5 \end{pmatrix}
"""
INTEGER = re.compile(r"-?\d+")
DECIMAL = re.compile(r"-?\d*\.\d+")
FRACTION = re.compile(r"(-?)\\[dt]?frac\s*\{?(\d+)\}?\s*\{?(\d+)\}?")
RANGE = re.compile(r"(?:x \\in )?(?:\\left)?([(\[])(.+?),(.+?)(?:\\right)?([)\]])")
UNICODE = [("-", "−"), (r"\pi", "π"), (r"\infty", "∞"), (r"\cup", "∪"), (r"^\circ", "°"),
           (r"\pm", "±")]


def inequality(gold, letter):
    """`3 < x \\leq 4` for `(3,4]`, or None."""
    match = RANGE.fullmatch(gold)
    if not match or r"\cup" in gold:
        return None
    left, low, high, right = match.groups()
    low, high = low.strip(), high.strip()
    text = letter if "infty" in low else f"{low} {'<' if left == '(' else chr(92) + 'leq'} {letter}"
    return text if "infty" in high else f"{text} {'<' if right == ')' else chr(92) + 'leq'} {high}"


def terms(gold):
    """The terms of a sum with their signs, or []: no brackets, relations, lists or words."""
    if re.search(r"[(\[=,]|\\(?:pm|text|mbox|begin|in)", gold):
        return []
    found, depth, start = [], 0, 0
    for i, c in enumerate(gold + "+"):
        depth += (c == "{") - (c == "}")
        if c in "+-" and depth == 0 and gold[start:i].strip():
            found.append(gold[start:i].strip())
            start = i
    return found if len(found) > 1 else []


def items(gold):
    """(opening, items, closing) of a list, a set, a tuple, an interval; else None."""
    match = re.fullmatch(r"(\\left\(|\\left\[|\\\{|[(\[]|)([^()\[\]=]+,[^()\[\]=]+)"
                         r"(\\right[)\]]|\\\}|[)\]]|)", gold)
    if not match or "text" in gold or "infty" in gold or re.search(r",\d{3}|,\\!", gold):
        return None
    return match[1], [item.strip() for item in match[2].split(",")], match[3]


def equivalents(gold):
    """[(kind, another way to write the gold)]"""
    made = []

    def add(kind, templates, text=gold, other=""):
        made.extend((kind, t.replace("@", text).replace("#", other)) for t in templates.split("  "))

    plain = not re.search(r"text|mbox|begin|=|\\in ", gold)
    add("wrapper", r"$@$  @.  \boxed{@}   @ ")
    for sign, other in UNICODE:
        if sign in gold:
            add("spelling", gold.replace(sign, other))
    add("spelling", "@", re.sub(r"\\[dt]?frac", r"\\dfrac", gold))
    if "text" not in gold and "matrix" not in gold:
        add("spelling", "@", re.sub(r"(?<!frac) ", r"\, ", gold))
        add("spelling", re.sub(r"(?<=[+=-]) | (?=[+=-])", "", gold))
    if r"\sqrt{" in gold:
        add("spelling", re.sub(r"\\sqrt\{(\w+)\}", r"√\1", gold))
    if "(" in gold and "frac" not in gold and "text" not in gold and r"\left" not in gold:
        add("spelling", re.sub(r"([(\[])", r"\\left\1", re.sub(r"([)\]])", r"\\right\1", gold)))
    if plain:
        add("wrapper", r"\displaystyle @  \color{red}{@}  \textcolor{blue}{@}  \mathbf{@}")
    if plain and not items(gold) and "cup" not in gold and not RANGE.fullmatch(gold):
        add("name", r"# = @  f(#) = @  \approx @  = @", other="w" if "w" not in gold else "u")
    if parts := terms(gold):
        turned = [part if part[0] in "+-" else "+" + part for part in parts[::-1]]
        add("order of a sum", " ".join(turned).lstrip("+"))
    if INTEGER.fullmatch(gold):
        n = int(gold)
        add("fraction", r"\frac{#}{3}", other=str(3 * n))
        add("decimal", "@.0  @.00", str(n))
        add("unit", r"@ \text{ cm}  @\text{ square units}  @ km/h  @ cm^2  @\ \mathrm{kg}  "
            r"@ \text{ apples}  \$@  @ \text{ miles per hour}", str(n))
        add("degrees", r"@^\circ  @^{\circ}  @°", str(n))
        add("wrapper", r"\text{@}  \mathrm{@}", str(n))
        add("arithmetic", "# + 4 = @", str(n), str(n - 4))
        if n > 0:
            teen = n % 100 in (11, 12, 13)
            ending = "th" if teen else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
            add("ordinal", r"@^{\text{#}}  @\text{#}  @#", str(n), ending)
            add("percent", r"@\%  @ \text{ percent}", str(n))
        for mark in (",", "{,}", r",\!", r"\,", " ") if n >= 10_000 else ():
            add("thousands", f"{n:,}".replace(",", mark))
        if n and n % 1000 == 0:
            add("scale", r"@ \text{ thousand}  @ \times 10^3", str(n // 1000))
    if DECIMAL.fullmatch(gold):
        value = Fraction(gold)
        add("fraction", rf"\frac{{{value.numerator}}}{{{value.denominator}}}  @0  @3")
        add("unit", r"@ \text{ grams}  \$@")
    if match := FRACTION.fullmatch(gold):
        sign, top, bottom = match[1], int(match[2]), int(match[3])
        add("fraction", f"{sign}{top}/{bottom}  {sign}\\frac{{{2 * top}}}{{{2 * bottom}}}  "
            rf"\frac{{{sign}{top}}}{{{bottom}}}  {sign}{top} \cdot \frac{{1}}{{{bottom}}}")
        if top > bottom:
            add("mixed", rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}")
        if top < 10 and bottom < 10:
            add("spelling", rf"{sign}\frac{top}{bottom}  {sign}\frac{{{top}}}{bottom}")
        if bottom in (4, 8, 16, 50, 100):
            add("decimal", f"{sign}{top / bottom}")
        if bottom in (3, 9) and top < bottom:
            add("decimal", rf"{sign}0.\overline{{{top * 9 // bottom}}}")
        add("unit", r"@ \text{ hours}")
    if match := re.fullmatch(r"(.+?)(?:\^\\circ|\\text\{ degrees\})", gold):
        add("degrees", r"@  @^{\circ}  @ \text{ degrees}", match[1])
    if match := re.fullmatch(r"\\\$(.*)", gold):
        add("unit", r"@  @ \text{ dollars}", match[1])
    if match := re.fullmatch(r"(.*?)\s*\\mbox\{ (\w+)\}\^2", gold):
        add("unit", r"@  @ \text{ square #}  @ \text{ #}^2", *match.groups())
    if match := re.fullmatch(r"(\d+)_\{?(\d)\}?", gold):
        add("base", "@_#  @_{#}", *match.groups())
    if match := re.fullmatch(r"\\text\{(\w+)\}", gold):
        add("words", r"@  \textbf{@}", match[1])
        add("words", match[1].capitalize())
    if (found := items(gold)) and r"\pm" not in gold:
        opening, members, closing = found
        add("spelling", f"{opening}{' , '.join(members)}{closing}")
        if opening in ("", r"\{"):
            add("list", r"\{@\}", ", ".join(members))
            add("list", ", ".join(f"{name}={m}" for name, m in zip("abcd", members)))
            for mark in (", ", r" \text{ and } ", " or "):
                add("list", mark.join(members[::-1]))
            add("list", r" \text{ or } ".join(f"x={m}" for m in members))
    if r"\pm" in gold and gold[0] != "\\":
        add("list", f"{gold.replace(chr(92) + 'pm', '+')}, {gold.replace(chr(92) + 'pm', '-')}")
    written = inequality(gold, "x")
    if written and (not items(gold) or gold[-1] == "]" or gold[0] == "["):  # (2,4) may be a point
        add("inequality", r"@  \{x \mid @\}  x \in #", written, gold.replace(r"x \in ", ""))
        if "x" not in gold:
            add("inequality", inequality(gold, r"\lambda"))
    if r"\cup" in gold:
        left, right = gold.split(r" \cup ")
        add("union", r"@ \cup #  @\cup#", right, left)
        add("union", r"@ \text{ or } #  \{x : @ \text{ or } #\}", *(
            inequality(side, "x") for side in (left, right)))
    if "matrix" in gold:
        add("matrix", gold.replace("pmatrix", "bmatrix"))
        add("matrix", gold.replace(" ", ""))
    if re.fullmatch(r"[a-z]\s*=.*", gold):
        add("name", gold.partition("=")[2].strip())
    return [(kind, answer) for kind, answer in made if answer != gold]


# Two guesses, one of them right: @ and #, in both orders.
GUESSES = [
    ("guess in words", r"@ \text{ or } #  @ or #  @ \text{ and } #  @ \text{ (or } #)  "
     r"@\text{, not } #  \text{either } @ \text{ or } #  @ \lor #  "
     r"@ \text{ if } n \text{ even}, # \text{ if } n \text{ odd}"),
    ("guess as a list", r"@, #  @; #  \{@, #\}  (@, #)  [@, #]  @ \quad #  @ \cup #"),
    ("guess as an equation", r"@ \neq #  @ : #  w = @ \text{ or } w = #"),
    ("guess in text", r"@ \text{ or #}  @ \text{ (#)}  @ \text{ to } #"),
]


def near_misses(gold, rng):
    """[(kind, an answer that is not the gold)]"""
    made = []

    def add(kind, templates, text=gold, other=""):
        made.extend((kind, t.replace("@", text).replace("#", other)) for t in templates.split("  "))

    if re.fullmatch(r"\\text\{\([A-J]\)\}", gold):
        add("second guess", r"\text{(#)}  @ or #  @, #  \text{(@) or (#)}  @#", gold[7],
            rng.choice([c for c in "ABCDE" if c != gold[7]]))
        return made
    words, integer = re.fullmatch(r"\\text\{.*\}", gold), INTEGER.fullmatch(gold)
    digits = [m.start() for m in re.finditer(r"\d", gold)]
    changed = [gold[:i] + str((int(gold[i]) + rng.randint(1, 9)) % 10) + gold[i + 1:]
               for i in rng.sample(digits, min(3, len(digits)))]
    for answer in changed:
        add("digit", answer)
    if integer and gold != "0":
        add("digit", "@0  @1  #  @.5  @.0001  @/7", other=gold[:-1])
    signs = [m.start() for m in re.finditer(r"[+-](?=[^+-]*[1-9a-z])", gold)]
    for i in rng.sample(signs, min(2, len(signs))):
        add("sign", gold[:i] + ("-" if gold[i] == "+" else "+") + gold[i + 1:])
    if not re.search(r"text|begin|=|,|\\in|pm", gold) and gold != "0":
        add("sign", "-(@)" if gold[0] != "-" else gold[1:])
    letters = [m.start() for m in re.finditer(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", gold)]
    for i in letters if not re.search(r"text|mbox|=|\\in", gold) else ():
        before, after = gold[:i], gold[i + 1:]
        for letter in (rng.choice([c for c in "abkmnptxyzRS" if c not in gold]),
                       gold[i].swapcase()):
            add("exchanged letter", before + letter + after)
        if re.search(r"[A-Za-z0-9)]\s*$", before):
            add("dropped letter", before + re.sub(r"^\^\{?\d+\}?", "", after))
    if match := re.fullmatch(r"(\d+)_\{?(\d)\}?", gold):
        add("base", "@_{#}  @_{10}  @_{12}  @_{a}  @_{2}", match[1], str(int(match[2]) + 1))
    if found := items(gold):
        opening, members, closing = found
        i, inner = rng.randrange(len(members)), ",".join(members)
        add("item dropped", ", ".join(members[:i] + members[i + 1:]))
        add("item dropped", f"{opening}{','.join(members[:-1])}{closing}")
        add("item more", f"{opening}{inner},77{closing}  {opening}{inner},{members[0]}{closing}")
        add("item changed", f"{opening}{','.join(members[:i] + ['77'] + members[i + 1:])}{closing}")
        if opening[-1:] in ("(", "["):
            add("item order", f"{opening}{','.join(members[::-1])}{closing}")
    if RANGE.search(gold) and "(a" not in gold:
        for i in [m.start() for m in re.finditer(r"[\[\]()]", gold)]:
            add("bracket", gold[:i] + dict(zip("[]()", "()[]"))[gold[i]] + gold[i + 1:])
    if (written := inequality(gold, "x")) and not (items(gold) and gold[0] + gold[-1] == "()"):
        turned = written.replace("<", "@").replace(r"\leq", "<").replace("@", r"\leq")
        add("bracket", r"@  \{x \mid @\}", turned)
    if r"\cup" in gold:
        left, right = gold.split(r" \cup ")
        add("item dropped", "@  #", left, right)
        add("words", r"@ \text{ and } #", inequality(left, "x"), inequality(right, "x"))
        add("words", gold.replace("cup", "cap"))
    guess = rng.choice([changed[0] if changed else "77", "x+3" if "x" not in gold else "y+3", "13"])
    for kind, templates in GUESSES if guess != gold else ():
        add(kind, templates, gold, guess)
        add(kind, templates, guess, gold)
        if kind == "guess as an equation" and "=" not in gold and "\\in" not in gold:
            for first, second in ((gold, guess), (guess, gold)):
                add(kind, r"@ = #  w = @ = #  @ \equiv #  @ \to #", first, second)
    if words:
        add("words", r"@ \text{ or } \text{odd}  \text{other}  not #  " + gold[6:-1][::-1],
            other=gold[6:-1])
    else:
        add("changed in text", r"@ \text{ hundredths}  \text{not } @  @ \text{ or more}  "
            r"@ \text{ or seven}  \text{at least } @  @ \text{ squared}")
        add("range", r"@ \pm 1  x > @  \le @")
    if integer and int(gold) > 1:
        add("base", "@_{7}  @_9  @_{a}  @_{n}")
        add("changed in text", r"@ \text{ thousand}  @ \text{ dozen}  @ \text{ million}  "
            r"@ \text{ hours } 30 \text{ minutes}  @\text{ cm} \times 7\text{ cm}")
        add("letter", "@x  @ m  @t  x - 1 = @  2x = @" + ("  @!" if int(gold) > 2 else ""))
        add("rounded", "#.9999999  @.0000001", other=str(int(gold) - 1))
    if match := FRACTION.fullmatch(gold):
        value = Fraction(int(match[2]), int(match[3])) * (-1 if match[1] else 1)
        add("rounded", f"{float(value) + 1e-7 * ((10**7 * value).denominator == 1):.7f}")
        add("sign", rf"\frac{{{match[3]}}}{{{match[2]}}}")
    if match := re.fullmatch(r"(\d*) ?\\pi", gold):
        add("rounded", f"{math.pi * int(match[1] or 1):.9f}")
    return made
