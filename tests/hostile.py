"""Answers that a model could write to stop, crash or fool the verifier: none of them is right."""
INSIDE = [
    *"\0\ud800\u202e\u200b\x1b\u0661\u2168\u00bd\r?", "", "9^{" * 500 + "9" + "}" * 500, "nan",
    "(((10^{10})!)!)!", "1" + "!" * 200, "(" * 60 + "9" + "!)" * 60, r"\def\a{\a}\a", "8 % 7",
    r"\sum_{n=1}^{\infty} \frac{f(7)^n}{n!}", r"\binom{10^9}{5\cdot 10^8}", r"\frac{1}{0}", "0^0^0",
    r"\int_{0}^{\infty} e^{e^{x}} dx", r"\lim_{x\to\infty} x^{x!}", r"\sqrt[10^{10}]{10^{10^{10}}}",
    r"\sum_{n=1}^{10^{12}} \frac{1}{n^{n}}", r"\write18{touch /tmp/owned}", "1e-999999999",
    "__import__('os').system('touch /tmp/owned')", "exec('while True: pass')", "exit()",
    "().__class__.__base__.__subclasses__()", ", ".join(map(str, range(1000))),
    "\\begin{pmatrix}" + r" \\ ".join([" & ".join("1" * 9)] * 9) + "\\end{pmatrix}",
    *[pair[0] * depth + "2" + pair[1] * depth for depth in (10, 1_000, 100_000) for pair in (
        ("{", "}"), ("(", ")"), ("-", ""), ("\\sqrt{", "}"), ("\\frac{1}{", "}"), ("x^{", "}"),
        ("\\boxed{", "}"), ("\\text{", "}"), ("$", "$"), ("7, ", ""), ("1", ""), ("0.", "3"))]]
TEXTS = [f"So \\boxed{{{inside}}}" for inside in INSIDE] + [
    "\\boxed{7} " * 9999 + "\\boxed{8}", "\\boxed{" * 10**5 + "7", "\\" * 10**6, "7" * 10**6,
    "</think>" * 10 + "\\boxed{8}", "\\boxed{7}</think>8", "\\boxed" + " " * 10**6 + "7",
    ("\\" * 50 + "boxed") * 20_000, "\\boxed{" + "{}" * 250_000, "\\fbox{7} \\boxed{8}"]
