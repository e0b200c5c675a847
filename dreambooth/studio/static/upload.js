// Sends the pictures that are dropped or chosen, one after another, each as the body of a request.
// What the server says of a file is shown as a text; the page itself shows what has arrived.
"use strict";

async function send(zone, files) {
  const status = zone.parentElement.querySelector("[data-upload-status]");
  status.replaceChildren();
  const say = (sentence) => {
    const line = document.createElement("p");
    line.textContent = sentence;
    status.append(line);
  };
  zone.classList.add("sending");
  let faults = 0;
  for (const file of files) {
    let fault = null;
    try {
      const reply = await fetch(`${zone.dataset.upload}?name=${encodeURIComponent(file.name)}`, {
        method: "POST",
        body: file,
      });
      if (!reply.ok) {
        const said = await reply.json().catch(() => ({}));
        fault = said.error ?? `${file.name} was not taken: the page had an error of its own.`;
      }
    } catch {
      fault = `${file.name} did not arrive: is the page still running?`;
    }
    if (fault !== null && ++faults <= 10) say(fault);
  }
  if (faults > 10) say(`${faults - 10} more were not taken.`);
  zone.classList.remove("sending");
}

const zoneOf = (event) => event.target.closest?.("[data-upload]");

document.addEventListener("dragover", (event) => {
  event.preventDefault(); // else a picture that misses the place would be opened instead of the page
  zoneOf(event)?.classList.add("over");
});
document.addEventListener("dragleave", (event) => zoneOf(event)?.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  const zone = zoneOf(event);
  zone?.classList.remove("over");
  if (zone) send(zone, [...event.dataTransfer.files]);
});
document.addEventListener("change", (event) => {
  const zone = zoneOf(event);
  if (!zone || event.target.type !== "file") return;
  const files = [...event.target.files];
  event.target.value = ""; // so that the same file can be chosen again
  send(zone, files);
});
