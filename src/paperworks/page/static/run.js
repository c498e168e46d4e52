// Keeps the page of a run up to date while it lasts. Without this script the page loads itself anew.
const view = document.querySelector("[data-events]");
const told = document.querySelector("[data-told]");

function show(html) {
  const log = view.querySelector(".log");
  const atEnd = !log || log.scrollTop + log.clientHeight > log.scrollHeight - 8;
  const scrolled = log?.scrollTop;
  const focused = document.activeElement.closest("[data-events] .log, [data-events] .scrolls")?.className;
  view.innerHTML = html;
  const renewed = view.querySelector(".log");
  if (renewed) renewed.scrollTop = atEnd ? renewed.scrollHeight : scrolled;
  if (focused) view.querySelector(`.${focused}`)?.focus({ preventScroll: true });
  // A screen reader speaks only when there is something new to say.
  const status = view.querySelector("[data-status]").textContent.trim();
  if (told.textContent !== status) told.textContent = status;
}

if (view) {
  const events = new EventSource(view.dataset.events);
  events.addEventListener("run", (event) => show(event.data));
  events.addEventListener("end", () => {
    events.close();
    location.reload();
  });
  // Where too many watch, the browser does not try again by itself.
  events.addEventListener("error", () => {
    if (events.readyState === EventSource.CLOSED) setTimeout(() => location.reload(), 15000);
  });
}
