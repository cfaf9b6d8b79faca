// What a page does besides charts: copy commands, show pictures in full, and mark the section that is being read.
"use strict";
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const text = button.parentElement.querySelector("code");
    let copied = true;
    try {
      await navigator.clipboard.writeText(text.textContent);
    } catch {  // refused, or a page that is not trusted with the clipboard
      getSelection().selectAllChildren(text);
      copied = document.execCommand("copy");
    }
    button.textContent = copied ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}

const dialog = document.body.appendChild(document.createElement("dialog"));
dialog.addEventListener("click", () => dialog.close());
for (const button of document.querySelectorAll(".enlarge")) {
  button.addEventListener("click", () => {
    const image = button.querySelector("img").cloneNode();
    image.removeAttribute("width");
    image.removeAttribute("height");
    dialog.replaceChildren(image);
    dialog.showModal();
  });
}

const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const sections = [...document.querySelectorAll("main > section")];
let marked = null;
function mark() {
  const { scrollTop, scrollHeight, clientHeight } = document.documentElement;
  const reached = sections.filter((section) => section.getBoundingClientRect().top < 0.3 * clientHeight);
  const atEnd = scrollTop > 0 && scrollTop + clientHeight >= scrollHeight - 2;
  const section = atEnd ? sections.at(-1) : reached.at(-1) ?? sections[0];
  const link = section && links.get(section.id);
  if (link === marked) return;
  marked?.removeAttribute("aria-current");
  link?.setAttribute("aria-current", "true");
  marked = link;
  // On a phone the contents are one line that scrolls sideways.
  const list = link?.closest("ol");
  if (list && list.scrollWidth > list.clientWidth) list.scrollLeft = link.offsetLeft - 16;
}
addEventListener("scroll", mark, { passive: true });
addEventListener("resize", mark);
mark();
