// Elements are made here and nowhere else. Text from data is only ever a text node.

// Characters that show nothing, or that turn the direction of the text around them, as escapes. The
// joiner of emoji stays.
function visible(text) {
  return text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (char) => {
    if ("\n\t\u200d".includes(char)) return char;
    const code = char.codePointAt(0);
    const size = code < 0x100 ? 2 : code < 0x10000 ? 4 : 8;
    return `\\${{ 2: "x", 4: "u", 8: "U" }[size]}${code.toString(16).padStart(size, "0")}`;
  });
}

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  const parts = children.flat(Infinity).filter((one) => one !== null && one !== undefined);
  node.append(...parts.map((one) => (typeof one === "string" ? visible(one) : one)));
  return node;
}

const byId = (id) => document.getElementById(id);

// A number for people: at most three decimal places, a true minus, and a sign if asked for.
function shown(number, signed = false, digits = 3) {
  if (number === null || number === undefined) return "–";
  const text = Math.abs(number)
    .toFixed(digits)
    .replace(/\.?0+$/, "");
  const sign = number < 0 && Number(text) ? "−" : signed && Number(text) ? "+" : "";
  return sign + text;
}

const plural = (count, one, many = `${one}s`) =>
  `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

// A part of the page that is filled when it is opened for the first time.
function folded(summary, fill, attributes = {}) {
  const node = el("details", attributes, el("summary", null, summary));
  let isFilled = false;
  const open = () => {
    if (node.open && !isFilled) {
      isFilled = true;
      node.append(...[fill()].flat());
    }
  };
  node.addEventListener("toggle", open);
  open();
  return node;
}
