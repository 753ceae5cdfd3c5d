"""Looks at the machine code of the kernels: no vector register may go to the stack in a hot loop.

usage: spills.py --objdump=OBJDUMP --canary=OBJECT:FUNCTION [--list] LIBRARY

A hot loop is an innermost one that multiplies: blocks that can be reached from one another, with
such an instruction among them and no smaller loop that has one. In it, a load or store of a vector register at a constant distance from
the stack or frame pointer is a spill: an accumulator, or a value that was to stay in a register,
goes through memory in every turn. A way round that calls a function is no hot loop: who calls must
save its registers. Arrays of the kernel's own on the stack are reached by other
registers or an index, and are not meant.

The canary is an object in which exactly FUNCTION spills: when that is not seen, nothing else that
this script says is worth anything, and it fails.
"""
import re
import subprocess
import sys

MULTIPLIES = re.compile(r"v?(pdpbusds?|dpbf16ps|fn?m(add|sub)\d+ps|pmaddubsw|pmaddwd|"
                        r"fml[as]|[us]dot|u?s?mmla|[su]ml[as]l2?|[su]mull2?|bfdot|bfmmla)$")
X86_VECTOR = re.compile(r"%[xyz]mm\d+")
X86_STACK = re.compile(r"(?<![\w)])-?(0x[0-9a-f]+)?\(%(rsp|rbp)\)")
ARM_VECTOR = re.compile(r"\b[qv]\d+\b")
ARM_STACK = re.compile(r"\[(sp|x29)(, #-?\w+)?\]")
FRAME_X86 = re.compile(r"mov\s+%rsp,%rbp")

# object, pattern of functions, most spills of a loop that are let pass. Each has a reason; a number
# keeps it from growing.
ALLOWED = [
    # Four tokens that are left of a run: once a tile, beside its unpacking, and never in the loop
    # over the tokens.
    ("gemm_packed_vnni", r"panel_[2-7]", 13),
    # One token, and sixteen registers: gcc makes several steps' products before it sums them.
    ("gemm_packed_avx2", r"panel_[2-7]", 17),
    ("gemm_packed_avx2", r"panel_8", 39),
    # Broadcast constants, loaded once for 64 or 137 products.
    ("attention_avx2", r"fl_attention_(forward|backward)_avx2", 9),
    # Constants of the exponential, loaded.
    ("attention_avx512", r"fl_attention_backward_avx512", 11),
    ("softmax_xent_avx2", r"fl_xent_grad_avx2", 3),
    ("softmax_xent_neon", r"fl_xent_update_neon", 2),
    # One value more than there are registers, stored and loaded once beside 128 products.
    ("gemm_packed_neon", r"panel_7", 2),
    # Vectors of fewer than four floats go by way of the stack; in attention, that way is in the
    # same loop as the dots, whose sums it drives to the stack.
    ("gemm_f32_neon", r"fl_gemm_f32_(nn|tn)_neon", 1),
    ("attention_neon", r"fl_attention_(forward|backward)_neon", 8),
    ("attention_neon", r"fl_attention_backward_neon", 27), # with -O3, beside 137 products
    # gcc keeps the stack's copy of the sums up to date in every turn of the ranks.
    ("gemm_f32_neon", r"fl_gemm_f32_rank_up_neon", 8),
]


def functions(objdump, path):
    """(object, function, [(address, mnemonic, operands)]) of an archive or object."""
    text = subprocess.run([objdump, "-d", "--no-show-raw-insn", path], capture_output=True,
                          text=True, check=True).stdout
    name, code, obj = None, [], ""
    for line in text.splitlines():
        if m := re.match(r"(\S+):\s+file format", line):
            obj = m[1].rsplit("/", 1)[-1].removesuffix(".c.o").removesuffix(".o")
        elif m := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            if code:
                yield obj_of_code, name, code
            name, code, obj_of_code = m[1], [], obj
        elif m := re.match(r"\s*([0-9a-f]+):\s+(?:\{\w+\}\s+)?([\w.]+)\s*(.*)$", line):
            code.append((int(m[1], 16), m[2], re.split(r"\s(?:# |<)|//", m[3])[0].strip()))
    if code:
        yield obj_of_code, name, code


def target_of(mnemonic, operands):
    """Where a jump within the function may go, or None."""
    if not re.match(r"(j[a-z]+|b|b\.\w+|cbn?z|tbn?z)$", mnemonic):
        return None
    m = re.search(r"(?:^|,\s*)([0-9a-f]+)$", operands)
    return int(m[1], 16) if m else None


def flow(code):
    """Basic blocks as ranges of instruction numbers, and the blocks that may follow each."""
    at = {address: i for i, (address, _, _) in enumerate(code)}
    jumps = {i: at[t] for i, (_, m, o) in enumerate(code) if (t := target_of(m, o)) in at}
    ends = [re.match(r"(jmp|b|br|ret|retq|ud2|brk)$", m) is not None for _, m, _ in code]
    starts = sorted({0} | set(jumps.values()) |
                    {i + 1 for i in range(len(code) - 1) if ends[i] or i in jumps})
    number = {first: n for n, first in enumerate(starts)}
    blocks = [range(a, b) for a, b in zip(starts, starts[1:] + [len(code)])]
    follow = []
    for block in blocks:
        last = block[-1]
        after = [number[jumps[last]]] if last in jumps else []
        if not ends[last] and last + 1 in number:
            after.append(number[last + 1])
        follow.append(after)
    return blocks, follow


def components(nodes, follow):
    """Strongly connected sets of blocks with a cycle (Tarjan 1972, without recursion)."""
    index, low, stack, on, found = {}, {}, [], set(), []
    for root in nodes:
        work = [(root, iter(follow[root]))] if root not in index else []
        while work:
            node, rest = work[-1]
            if node not in index:
                index[node] = low[node] = len(index)
                stack.append(node)
                on.add(node)
            for other in rest:
                if other not in nodes:
                    continue
                if other not in index:
                    work.append((other, iter(follow[other])))
                    break
                if other in on:
                    low[node] = min(low[node], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    one = set(stack[stack.index(node):])
                    del stack[-len(one):]
                    on -= one
                    if len(one) > 1 or node in follow[node]:
                        found.append(one)
    return found


def innermost(nodes, follow, wanted):
    """Loops that satisfy `wanted` and hold no smaller one that does."""
    for loop in components(nodes, follow):
        if not wanted(loop):
            continue
        heads = {b for a in range(len(follow)) if a not in loop for b in follow[a]} & loop
        smaller = None
        for head in heads or {min(loop)}:  # without its way back, loops inside are left
            cut = [[b for b in after if b != head] if a in loop else after
                   for a, after in enumerate(follow)]
            left = components(loop, cut)
            # A loop that is entered in two places has its head where less is left.
            if smaller is None or sum(map(len, left)) < sum(map(len, smaller[0])):
                smaller = (left, cut)
        found = list(innermost(loop, smaller[1], wanted)) if any(map(wanted, smaller[0])) else []
        yield from found or [loop]


def is_spill(operands, frame):
    for vector, stack in ((X86_VECTOR, X86_STACK), (ARM_VECTOR, ARM_STACK)):
        m = stack.search(operands)
        if m and vector.search(operands):
            base = m[2] if stack is X86_STACK else m[1]
            return base in ("rsp", "sp") or frame
    return False


def hot_spills(code):
    """Of every hot loop: [(address, spills, products)]."""
    frame = any(FRAME_X86.match(f"{m} {o}") for _, m, o in code) or \
        any(m == "mov" and o.startswith("x29, sp") for _, m, o in code)
    blocks, follow = flow(code)
    product = [MULTIPLIES.match(m) is not None for _, m, _ in code]

    def products(loop):
        return sum(product[i] for b in loop for i in blocks[b])

    found = []
    quiet = {b for b, block in enumerate(blocks)
             if not any(re.match(r"(callq?|blr?)$", code[i][1]) for i in block)}
    for loop in innermost(quiet, follow, products):
        bad = sum(is_spill(code[i][2], frame) for b in loop for i in blocks[b])
        found.append((code[blocks[min(loop)][0]][0], bad, products(loop)))
    return found


def main(options, library):
    objdump = options["--objdump"]
    canary, _, want = options["--canary"].rpartition(":")
    seen = {name for _, name, code in functions(objdump, canary)
            if any(bad for _, bad, _ in hot_spills(code))}
    if seen != {want}:
        print(f"the canary: {want} must spill and nothing else, but {sorted(seen)} does")
        return 1
    wrong, hot = 0, 0
    for obj, name, code in functions(objdump, library):
        for address, bad, products in hot_spills(code):
            hot += 1
            most = max((n for o, f, n in ALLOWED if o == obj and re.fullmatch(f, name)), default=0)
            if bad > most:
                wrong += 1
            if bad > most or "--list" in options:
                print(f"{obj} {name}+{address - code[0][0]:#x}: {bad} moves of vector registers "
                      f"to or from the stack beside {products} products")
    if hot == 0:
        print("no loop with products was found: is this the library of the kernels?")
        return 1
    print(f"{hot} hot loops, {wrong} with spills")
    return int(wrong != 0)


if __name__ == "__main__":
    given = [a for a in sys.argv[1:] if not a.startswith("--")]
    sys.exit(main(dict((a.split("=", 1) + [""])[:2] for a in sys.argv[1:] if a.startswith("--")),
                  given[0]))
