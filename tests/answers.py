"""gold: answers to it, three blanks apart. What people and models write, and near misses."""
RIGHT = {
    "42": r"42   $42$   42.   42.0   042   +42   x = 42   m+n=42   f(2) = 42   =42   \approx 42   "
          r"(42)   \text{42}   \mathbf{42}   \color{red}{42}   \textcolor{blue}{42}   {\bf 42}   "
          r"42^\circ   42^{\circ}   42\%   \$42   42 \text{ cm}^2   42\text{ apples}   42 km/h   "
          r"42\ \mathrm{kg}   42^{\text{th}}   \frac{84}{2}   \dfrac{84}{2} = 42   6 \cdot 7   "
          r"\left( 42 \right)   \boxed{42}   84/2   126 \times \frac{1}{3}",
    "100000": r"10^5   10^{5}   100,000   100{,}000   100\,000   100 000   100,\!000",
    "117649": "7^6   7^{6} = 117649", "-3": r"-3   −3   \frac{-6}{2}   -\frac{6}{2}   x=-3",
    r"\frac{1}{2}": r"0.5   1/2   \frac12   .50   \frac{1}{2} \approx 0.5   y=\frac12",
    r"\frac{\sqrt{3}}{3}": r"\frac{1}{\sqrt3}   \frac{\sqrt 3}{3}   \tan x = \frac{\sqrt3}{3}",
    "3+2t": "2t+3   r = 2t + 3   (6+4t)/2", "2k": r"k\cdot 2   2 k", r"\pi": r"\frac{2\pi}{2}",
    r"\left(3,\frac{\pi}{2}\right)": r"(3, \pi/2)   \left( 3, \dfrac{\pi}{2} \right)",
    r"(-\infty,2)\cup(3,\infty)": r"(3, \infty) \cup (-\infty, 2)", "[0,1)": r"\left[0, 1\right)",
    "1,-2": r"-2, 1   1 \text{ and } -2   x=1, x=-2   \{1, -2\}", "y = 2x + 3": "2x-y+3=0   2x + 3",
    "6 - 5i": "-5i + 6", r"\text{Evelyn}": r"Evelyn   \textbf{Evelyn}   evelyn.",
    r"\text{(C)}": r"C   (C)   \text{C}   \textbf{(C)}", r"1\frac{4}{5}": r"\frac95   1.8",
    r"\begin{pmatrix} -1 & 0 \\ 0 & 2 \end{pmatrix}": r"\begin{bmatrix} -1&0\\ 0&2 \end{bmatrix}",
    "204_5": "204_{5}"}
WRONG = {
    "42": r"41   -42   420   4.2   42 \text{ or } 43   42 or 43   42, 43   \{42, 43\}   42 \pm 1   "
          r"43 = 42   42 = 43   2x = 42   x \neq 42   x > 42   x \neq 1, y = 42   42_9   42!   "
          r"42 dozens   42 \text{ dozen}   42 \text{ tens}   42 hundredths   42 \text{ is wrong}   "
          r"42 never   42 approximately   42 otherwise   \text{not } 42   42 43   42x   --42   "
          r"42.0000001   42 \cdot   40\frac{2}{1}   40(2)   84/2/2   42\text{ to }43   42k   4{2}",
    "-9": "1-10   1 - 10", "k": "K   x",
    "8": r"(5)(3)   5(3)   5 3   5{3}   5\frac{3}{1}   5\binom{3}{1}   5\,3   [5][3]",
    "2k": "2K   2m   2", "3R^2": "3r^2", "204_5": "204_7   204", r"\frac{1}{3}": "0.333333",
    r"\sqrt{2}": r"1.41421356237309504880   \sqrt{3}", "(1,2)": "(2,1)   1",
    r"10^{-600}": r"10^{-601}   0   2 \cdot 10^{-600}", r"\text{east}": "seat   east or west",
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}": r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}",
    "C": "CD   A or C", "[0,1)": "[0,1]   (0,1)"}

def pairs(table):
    return [(gold, answer) for gold, answers in table.items() for answer in answers.split("   ")]
