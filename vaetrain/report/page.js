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
const visible = new Set();
const observer = new IntersectionObserver((changes) => {
  for (const change of changes) visible[change.isIntersecting ? "add" : "delete"](change.target.id);
  const first = [...links.keys()].find((id) => visible.has(id));
  for (const [id, link] of links) {
    if (id !== first) { link.removeAttribute("aria-current"); continue; }
    link.setAttribute("aria-current", "true");
    // On a phone the contents are one line that scrolls sideways.
    const list = link.closest("ol");
    if (list.scrollWidth > list.clientWidth) list.scrollLeft = link.offsetLeft - 16;
  }
}, { rootMargin: "-15% 0px -60% 0px" });
for (const section of document.querySelectorAll("main > section")) observer.observe(section);
